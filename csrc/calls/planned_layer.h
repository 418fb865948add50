// A planned layer as a node of torch's autograd: rnnkern.planned.PlannedLayer in C++. What is not plain memory in
// undisturbed eager mode when gradients are asked for, it leaves to Python, and so does a graph of the gradients.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "program.h"
#include "python_tensors.h"

namespace rnnkern {

// How gradients are found where the same ones are given and asked for.
struct Back {
    int threads;
    std::vector<bool> needs;
    std::vector<std::optional<Numbers>> strides;  // of each gradient that is given
    std::shared_ptr<Program> program;
    Integer inputs;                                // so many dx, one of each direction, are the first that it makes
    Numbers summed;                                // which have a part for each share of the batch
    std::vector<std::optional<Integer>> returned;  // which is the gradient of each tensor of the call

    bool is_for(const Tensors& grads, const std::vector<bool>& wanted) const {
        return threads == at::get_num_threads() && needs == wanted &&
               std::equal(grads.begin(), grads.end(), strides.begin(), strides.end(),
                          [](const auto& grad, const auto& known) {
                              return grad.defined() ? known && grad.strides() == *known : !known;
                          });
    }
};

// What a tensor kept for backward looks like.
struct Look {
    Numbers shape, strides;
    at::ScalarType type;
    c10::DispatchKeySet keys;

    Look(const at::Tensor& tensor)
        : shape(tensor.sizes().vec()),
          strides(tensor.strides().vec()),
          type(tensor.scalar_type()),
          keys(tensor.key_set()) {}

    bool fits(const at::Tensor& tensor) const {
        return keys == tensor.key_set() && tensor.scalar_type() == type && tensor.sizes() == shape &&
               tensor.strides() == strides;
    }
};

// Whether no mode, transform or tracer of torch watches the operations of this thread: each has a dispatch key there.
inline bool is_undisturbed() {
    return c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set;
}

class PlannedLayer {
  public:
    // Of what the program makes it gives the first few, and keeps some for backward. `back` is LayerPlan.back, and
    // `again` finds gradients in Python: (tensors, saved, grads, needs) -> gradients.
    PlannedLayer(std::shared_ptr<Program> program, Integer gives, Numbers keeps, py::object back, py::object again)
        : program_(std::move(program)),
          gives_(gives),
          keeps_(std::move(keeps)),
          back_(std::move(back)),
          again_(std::move(again)) {}

    // What it gives, and all that backward needs. With the GIL, which only the program runs without: a thread that
    // forks must not find another one inside of autograd, whose locks its child would wait for.
    std::pair<Tensors, Tensors> forward(at::TensorList tensors) {
        Tensors made;
        {
            py::gil_scoped_release no_gil;
            made = program_->run(tensors);
        }
        Tensors kept(tensors.begin(), tensors.end());
        for (auto i : keeps_) kept.push_back(made[i]);
        {
            std::lock_guard<std::mutex> lock(notes);
            if (looks_.empty() && std::none_of(kept.begin(), kept.end(), is_refused)) {
                looks_.assign(kept.begin(), kept.end());  // as those of all calls
            }
        }
        made.resize(gives_);
        return {std::move(made), std::move(kept)};
    }

    // The gradients of the tensors given to forward that are needed.
    Tensors backward(const Tensors& kept, const Tensors& grads, const std::vector<bool>& needs) {
        return is_plain(kept, grads) ? gradients(kept, grads, needs) : again(kept, grads, needs);
    }

    std::size_t given(const Tensors& kept) const { return kept.size() - keeps_.size(); }

  private:
    // What autograd does not save, and so is in no call that has a backward.
    static bool is_refused(const at::Tensor& tensor) { return tensor.is_inference(); }

    // Whether kernels can read a plain gradient as it is: the numbers of a row adjacent.
    static bool is_readable(const at::Tensor& grad) {
        return grad.stride(-1) == 1 || grad.size(-1) <= 1 || grad.numel() == 0;
    }

    // Hooks, or who sets a tensor's data, may have changed what was kept.
    bool is_plain(const Tensors& kept, const Tensors& grads) const {
        const auto fits = [](const at::Tensor& tensor, const Look& look) { return look.fits(tensor); };
        return !at::GradMode::is_enabled() && is_undisturbed() &&
               std::equal(kept.begin(), kept.end(), looks_.begin(), looks_.end(), fits) &&
               std::all_of(grads.begin(), grads.end(), [this](const at::Tensor& grad) {
                   return !grad.defined() || (grad.key_set() == looks_[0].keys && grad.scalar_type() == looks_[0].type);
               });
    }

    Tensors gradients(const Tensors& kept, const Tensors& grads, const std::vector<bool>& needs) {
        auto given = grads;
        for (auto& grad : given) {
            if (grad.defined() && !is_readable(grad)) grad = grad.contiguous();
        }
        auto back = find(given, needs);
        if (back == nullptr) back = learn(given, needs);
        given.erase(std::remove_if(given.begin(), given.end(), [](const auto& grad) { return !grad.defined(); }),
                    given.end());
        auto made = back->program->run(kept, given);
        for (Integer d = 1; d < back->inputs; ++d) made[0].add_(made[d]);
        for (auto i : back->summed) made[i] = total(made[i]);
        Tensors found;
        found.reserve(back->returned.size());
        for (const auto& i : back->returned) found.push_back(i ? made[*i] : at::Tensor());
        return found;
    }

    std::shared_ptr<Back> find(const Tensors& grads, const std::vector<bool>& needs) {
        std::lock_guard<std::mutex> lock(notes);
        for (const auto& back : backs_) {
            if (back->is_for(grads, needs)) return back;
        }
        return nullptr;
    }

    // Asks Python how such gradients are found, once for each kind.
    std::shared_ptr<Back> learn(const Tensors& grads, const std::vector<bool>& needs) {
        auto found = std::make_shared<Back>();
        {
            py::gil_scoped_acquire gil;
            const py::tuple answer = back_(to_python(grads), needs), back = answer[1];
            found->program = back[0].cast<std::shared_ptr<Program>>();
            found->inputs = back[1].cast<Integer>();
            found->summed = back[2].cast<Numbers>();
            found->returned = back[3].cast<std::vector<std::optional<Integer>>>();
        }
        found->threads = at::get_num_threads();
        found->needs = needs;
        for (const auto& grad : grads) {
            found->strides.push_back(grad.defined() ? std::optional(grad.strides().vec()) : std::nullopt);
        }
        std::vector<std::shared_ptr<Back>> old;  // let go without the lock
        std::lock_guard<std::mutex> lock(notes);
        if (backs_.size() >= MOST_BACKS) old.swap(backs_);
        backs_.push_back(found);
        return found;
    }

    // (shares, ...) -> the sum over shares, in their order.
    static at::Tensor total(const at::Tensor& of_shares) {
        auto sum = of_shares[0] + of_shares[1];
        for (Integer share = 2; share < of_shares.size(0); ++share) sum.add_(of_shares[share]);
        return sum;
    }

    Tensors again(const Tensors& kept, const Tensors& grads, const std::vector<bool>& needs) const {
        const at::TensorList all(kept);
        py::gil_scoped_acquire gil;
        return from_python(
            again_(to_python(all.slice(0, given(kept))), to_python(all.slice(given(kept))), to_python(grads), needs));
    }

    // A gradient that is a view has the strides of the whole: there may be any number of these.
    static constexpr std::size_t MOST_BACKS = 16;

    std::shared_ptr<Program> program_;
    Integer gives_;
    Numbers keeps_;
    Held back_, again_;
    std::vector<Look> looks_;  // of what is kept
    std::vector<std::shared_ptr<Back>> backs_;
};

// A planned layer in the form of a tensor, the only thing that autograd keeps and compiled autograd hands on: its
// memory is the layer.
class LayerHandle {
  public:
    explicit LayerHandle(std::shared_ptr<PlannedLayer> layer)
        : layer_(layer.get()), tensor_(at::from_blob(layer.get(), {1}, [layer](void*) {}, at::kByte)) {}

    PlannedLayer& layer() const { return *layer_; }
    const at::Tensor& tensor() const { return tensor_; }
    static PlannedLayer& layer_of(const at::Tensor& tensor) { return *static_cast<PlannedLayer*>(tensor.data_ptr()); }

  private:
    PlannedLayer* layer_;
    at::Tensor tensor_;
};

struct PlannedLayerFunction : torch::autograd::Function<PlannedLayerFunction> {
    using Context = torch::autograd::AutogradContext;

    static Tensors forward(Context* ctx, const LayerHandle& handle, at::TensorList tensors) {
        auto [given, kept] = handle.layer().forward(tensors);
        ctx->saved_data["layer"] = handle.tensor();
        ctx->set_materialize_grads(false);
        ctx->save_for_backward(std::move(kept));
        return given;
    }

    static Tensors backward(Context* ctx, const Tensors& grads) {
        const auto handle = ctx->saved_data["layer"].toTensor();
        auto& layer = LayerHandle::layer_of(handle);
        const auto kept = ctx->get_saved_variables();
        std::vector<bool> needs(layer.given(kept));
        for (std::size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
        Tensors found{at::Tensor()};  // of the layer itself
        for (auto& grad : layer.backward(kept, grads, needs)) found.push_back(std::move(grad));
        return found;
    }
};

}  // namespace rnnkern
