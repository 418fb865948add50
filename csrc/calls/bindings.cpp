// The module rnnkern._calls: planned calls of the CPU backend in C++ (rnnkern/backends/numba_cpu/native.py).

#include "planned_layer.h"

namespace rnnkern {
namespace {

using RegionFields = std::tuple<Integer, bool, std::vector<Share>, Integer, Integer>;  // those of a Region

std::shared_ptr<Launch> make_launch(std::vector<Integer> integers, std::vector<Field> fields,
                                    const std::vector<RegionFields>& regions, Integer enter) {
    std::vector<Region> found;
    for (const auto& [kernel, wide, shares, taking, work] : regions)
        found.push_back({kernel, wide, shares, taking, work});
    return std::make_shared<Launch>(std::move(integers), std::move(fields), std::move(found), enter);
}

// Calls `run` with the tensors of a Python call, without the GIL.
template <typename Run>
py::tuple call(const py::args& arguments, Run run) {
    const auto given = from_python(arguments);
    Tensors found;
    {
        py::gil_scoped_release no_gil;
        found = run(at::TensorList(given));
    }
    return to_python(found);
}

PYBIND11_MODULE(_calls, module) {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    py::class_<Launch, std::shared_ptr<Launch>>(module, "Launch").def(py::init(&make_launch));
    py::class_<Program, std::shared_ptr<Program>>(module, "Program")
        .def(py::init<std::vector<std::shared_ptr<Launch>>, Tensors, std::vector<Numbers>, std::vector<Numbers>,
                      Numbers, Integer>())
        .def("__call__", [](const Program& program, const py::args& tensors) {
            return call(tensors, [&program](at::TensorList given) { return program.run(given); });
        });
    py::class_<PlannedLayer, c10::intrusive_ptr<PlannedLayer>>(module, "PlannedLayer")
        .def(py::init(
            [](std::shared_ptr<Program> program, Integer gives, Numbers keeps, py::object back, py::object again) {
                return c10::make_intrusive<PlannedLayer>(std::move(program), gives, std::move(keeps), std::move(back),
                                                         std::move(again));
            }))
        .def("__call__", [](const c10::intrusive_ptr<PlannedLayer>& layer, const py::args& tensors) {
            return call(tensors, [&layer](at::TensorList given) { return PlannedLayerFunction::apply(layer, given); });
        });
}

}  // namespace
}  // namespace rnnkern
