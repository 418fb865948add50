// The module rnnkern._calls: planned calls of the CPU backend in C++ (rnnkern/native.py).

#include "known_calls.h"

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

py::tuple run(const Program& program, const py::args& tensors) {
    const auto given = from_python(tensors);
    Tensors made;
    {
        py::gil_scoped_release no_gil;
        made = program.run(given);
    }
    return to_python(made);
}

LayerHandle make_layer(std::shared_ptr<Program> program, Integer gives, Numbers keeps, py::object back,
                       py::object again) {
    return LayerHandle(
        std::make_shared<PlannedLayer>(std::move(program), gives, std::move(keeps), std::move(back), std::move(again)));
}

py::tuple call(const LayerHandle& handle, const py::args& tensors) {
    const auto given = from_python(tensors);
    return to_python(PlannedLayerFunction::apply(handle, at::TensorList(given)));
}

PYBIND11_MODULE(_calls, module) {
    watch_forks();
    py::class_<Launch, std::shared_ptr<Launch>>(module, "Launch").def(py::init(&make_launch));
    py::class_<Program, std::shared_ptr<Program>>(module, "Program")
        .def(py::init<std::vector<std::shared_ptr<Launch>>, Tensors, std::vector<Numbers>, std::vector<Numbers>,
                      Numbers, Integer>())
        .def("__call__", &run);
    py::class_<LayerHandle>(module, "PlannedLayer").def(py::init(&make_layer)).def("__call__", &call);
    py::class_<KnownCalls>(module, "KnownCalls")
        .def(py::init<>())
        .def("__call__", &KnownCalls::operator())
        .def("__len__", &KnownCalls::size)
        .def("add", &KnownCalls::add);
}

}  // namespace
}  // namespace rnnkern
