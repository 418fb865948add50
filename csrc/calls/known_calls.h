// Calls that look like earlier ones, found and run without Python in between: rnnkern.shortcut.KnownCalls in C++.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "planned_layer.h"

namespace rnnkern {

// Whether nothing but eager computation on the CPU is going on: rnnkern.compat.is_undisturbed. The dispatch keys alone,
// which backward looks at, do not tell: inference mode changes them, and modes of functions have none.
inline bool in_undisturbed_eager() {
    return c10::impl::TorchDispatchModeTLS::stack_len() == 0 && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
           !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
           !torch::jit::tracer::isTracing() && torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
           !at::autocast::is_autocast_enabled(at::kCPU);
}

// What makes the tensors of a call, and which of them are its results: the output, and so many states, from one on.
struct Direct {
    std::variant<std::shared_ptr<Program>, LayerHandle> makes;
    std::size_t output, first_state, states;

    py::tuple operator()(const Tensors& given) const {
        const auto made = run(given);
        return py::make_tuple(to_python(made[output]), to_python(at::TensorList(made).slice(first_state, states)));
    }

  private:
    Tensors run(const Tensors& given) const {
        if (const auto* handle = std::get_if<LayerHandle>(&makes)) {
            return PlannedLayerFunction::apply(*handle, at::TensorList(given));
        }
        py::gil_scoped_release no_gil;
        return std::get<std::shared_ptr<Program>>(makes)->run(given);
    }
};

// What tells the calls of a plan. All tensors of a call are in one list: input, initial states, weights, resets.
struct KnownCall {
    Py_ssize_t states;  // so many initial states, -1 for none
    bool graded;
    int threads;
    std::vector<Look> looks;
    std::vector<bool> needs;  // whether gradients flow into each

    bool fits(Py_ssize_t of_states, const std::vector<PyObject*>& tensors) const {
        if (of_states != states || graded != at::GradMode::is_enabled() || threads != at::get_num_threads() ||
            tensors.size() != looks.size()) {
            return false;
        }
        for (std::size_t i = 0; i < looks.size(); ++i) {
            if (!THPVariable_CheckExact(tensors[i])) return false;
            const auto& tensor = THPVariable_Unpack(tensors[i]);
            if (!looks[i].fits(tensor) || needs[i] != (graded && tensor.requires_grad())) return false;
        }
        return true;
    }
};

class KnownCalls {
  public:
    // The results of a call like one of those that were added; None where there was none, or the call must go the
    // ordinary way.
    py::object operator()(py::handle x, py::handle states, py::handle weights, py::handle resets) const {
        const bool listed = PyList_Check(weights.ptr()) || PyTuple_Check(weights.ptr());
        if (!listed || !(states.is_none() || PyTuple_CheckExact(states.ptr())) || !in_undisturbed_eager()) {
            return py::none();
        }
        // who hooks what autograd saves wants to see what the ordinary way saves
        if (at::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks(true)) return py::none();
        const auto tensors = in_one_list(x, states, weights, resets);
        for (const auto& [known, plan] : plans_) {
            if (known.fits(count(states), tensors)) return run(plan, tensors, x, states, weights, resets);
        }
        return py::none();
    }

    // `direct` are the fields of a Direct, None for a plan that is run in Python.
    void add(py::object plan, py::handle direct, py::handle x, py::handle states, const py::sequence& of_weights,
             py::handle resets) {
        const py::tuple weights(of_weights);
        KnownCall known{count(states), at::GradMode::is_enabled(), at::get_num_threads(), {}, {}};
        for (auto* object : in_one_list(x, states, weights, resets)) {
            const auto& tensor = THPVariable_Unpack(object);
            known.looks.emplace_back(tensor);
            known.needs.push_back(known.graded && tensor.requires_grad());
        }
        plans_.emplace_back(std::move(known), Plan{std::move(plan), direct_of(direct)});
    }

    std::size_t size() const { return plans_.size(); }

  private:
    struct Plan {
        py::object python;
        std::optional<Direct> direct;
    };

    static Py_ssize_t count(py::handle states) { return states.is_none() ? -1 : PyTuple_GET_SIZE(states.ptr()); }

    static std::vector<PyObject*> in_one_list(py::handle x, py::handle states, py::handle weights, py::handle resets) {
        std::vector<PyObject*> tensors{x.ptr()};
        tensors.reserve(16);
        for (const auto& part : {states, weights, resets}) {
            if (part.is_none()) continue;
            auto* const* first = PySequence_Fast_ITEMS(part.ptr());
            tensors.insert(tensors.end(), first, first + PySequence_Fast_GET_SIZE(part.ptr()));
        }
        return tensors;
    }

    static std::optional<Direct> direct_of(py::handle fields) {
        if (fields.is_none()) return std::nullopt;
        const auto [makes, output, first_state, states] =
            fields.cast<std::tuple<py::object, std::size_t, std::size_t, std::size_t>>();
        if (py::isinstance<LayerHandle>(makes)) return Direct{makes.cast<LayerHandle>(), output, first_state, states};
        return Direct{makes.cast<std::shared_ptr<Program>>(), output, first_state, states};
    }

    static py::object run(const Plan& plan, const std::vector<PyObject*>& tensors, py::handle x, py::handle states,
                          py::handle weights, py::handle resets) {
        // copies: other threads may add plans, or forget them all, while this one runs
        if (!plan.direct) {
            const auto python = plan.python;
            return python(x, states.is_none() ? py::tuple() : py::reinterpret_borrow<py::tuple>(states), weights,
                          resets);
        }
        const auto direct = *plan.direct;
        Tensors given;
        given.reserve(tensors.size());
        for (auto* object : tensors) given.push_back(THPVariable_Unpack(object));
        return direct(given);
    }

    std::vector<std::pair<KnownCall, Plan>> plans_;
};

}  // namespace rnnkern
