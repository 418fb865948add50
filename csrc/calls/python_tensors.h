// Tensors and other objects on their way between Python and C++. All of it needs the GIL.

#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "program.h"

namespace rnnkern {

namespace py = pybind11;

inline py::object to_python(const at::Tensor& tensor) {
    return tensor.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)) : py::none();
}

inline py::tuple to_python(at::TensorList tensors) {
    py::tuple found(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        PyTuple_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(i), to_python(tensors[i]).release().ptr());
    }
    return found;
}

// None becomes an undefined tensor.
inline Tensors from_python(const py::handle& sequence) {
    Tensors found;
    found.reserve(py::len(sequence));
    for (const auto& item : sequence) {
        if (item.is_none()) {
            found.emplace_back();
        } else if (THPVariable_Check(item.ptr())) {
            found.push_back(THPVariable_Unpack(item.ptr()));
        } else {
            throw py::type_error("expected a tensor, got " + py::repr(item).cast<std::string>());
        }
    }
    return found;
}

// Holds a Python object where it may be let go without the GIL, and after Python has ended.
class Held {
  public:
    explicit Held(py::object object)
        : pointer_(object.release().ptr(), [](PyObject* pointer) {
              if (Py_IsInitialized() == 0) return;
              py::gil_scoped_acquire gil;
              Py_DECREF(pointer);
          }) {}

    template <typename... Arguments>
    py::object operator()(Arguments&&... arguments) const {
        return py::handle(pointer_.get())(std::forward<Arguments>(arguments)...);
    }

  private:
    std::shared_ptr<PyObject> pointer_;
};

}  // namespace rnnkern
