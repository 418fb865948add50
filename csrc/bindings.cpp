// The Python module, `_cuda` or in tests `_host`: integers in, a failure turned into an exception. No torch headers:
// buffers come as addresses.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "selftest.h"
#include "sweep.h"
#ifdef RNNKERN_HOST
#include "host/emulator.h"
#endif

namespace py = pybind11;

namespace rnnkern {
namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;      // one for each direction, or none
using Layout = std::array<std::int64_t, 4>;  // address, step, sequence, direction: the fields of Rows

void* pointer(Address address) {
    return reinterpret_cast<void*>(address);
}

Rows rows(const Layout& layout) {
    return {pointer(static_cast<Address>(layout[0])), layout[1], layout[2], layout[3]};
}

const int64_t* integers(Address address) {
    return static_cast<const int64_t*>(pointer(address));
}

void of_directions(const Addresses& given, const void* (&to)[kMostDirections]) {
    for (std::size_t d = 0; d < kMostDirections; ++d) to[d] = d < given.size() ? pointer(given[d]) : nullptr;
}

template <class Sweep>
using Run = Failure (*)(const Sweep&, const char*, Tile, void*);

// RNNKERN_PRECISIONS(X), X(float32) X(float64) ..., comes from build.py, which compiles the sweeps for these.
#define RNNKERN_ROW(name) {#name, {forward<precision::name>, backward<precision::name>}},
const std::map<std::string, std::pair<Run<ForwardSweep>, Run<BackwardSweep>>> kPrecisions = {
    RNNKERN_PRECISIONS(RNNKERN_ROW)};
#undef RNNKERN_ROW

const std::map<std::string, Tile> kTiles = {
    {"automatic", Tile::automatic}, {"small", Tile::small}, {"large", Tile::large}};

// What every call says beside the sweep itself.
struct Call {
    std::string cell, precision, tile;
    int device;
    Address stream;
};

// Makes a device current and puts the one before back.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        check(cudaGetDevice(&before_));
        changed_ = before_ != device;
        if (changed_) check(cudaSetDevice(device));
    }
    ~CurrentDevice() {
        if (changed_) cudaSetDevice(before_);  // else it might make a context where nobody wants one
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    static void check(cudaError_t error) {
        if (error != cudaSuccess)
            throw std::runtime_error(std::string("rnnkern: no CUDA device can be used: ") + cudaGetErrorString(error));
    }
    int before_ = 0;
    bool changed_ = false;
};

template <class Sweep>
void run(Run<Sweep> function, const Sweep& sweep, const Call& call) {
    Failure failure = {};
    std::string reason;
    {
        py::gil_scoped_release release;
        CurrentDevice current(call.device);
        failure = function(sweep, call.cell.c_str(), kTiles.at(call.tile), pointer(call.stream));
        if (failure.error != cudaSuccess) reason = cudaGetErrorString(static_cast<cudaError_t>(failure.error));
    }
    if (failure.error == cudaSuccess) return;
    const Sizes& sizes = sweep.sizes;
    throw std::runtime_error("rnnkern: kernel " + std::string(failure.kernel) + " (general tier, " + call.cell + ", " +
                             call.precision + ", " + call.tile + " tile) failed after " +
                             std::to_string(failure.launch) + " launches at T=" + std::to_string(sizes.steps) +
                             " B=" + std::to_string(sizes.batch) + " H=" + std::to_string(sizes.hidden) + " P=" +
                             std::to_string(sizes.outputs) + " D=" + std::to_string(sizes.directions) + ": " + reason);
}

Sizes sizes_of(const std::array<std::int64_t, 5>& given) {
    return {given[0], given[1], given[2], given[3], given[4]};
}

Extras extras_of(Address recurrent_mask, const Layout& zone_mask_h, const Layout& zone_mask_c, double zoneout_h,
                 double zoneout_c, Address reset, const Layout& reset_h, const Layout& reset_c,
                 const Addresses& weight_ch, const Addresses& ln_hh_weight, const Addresses& ln_hh_bias,
                 const Addresses& ln_c_weight, const Addresses& ln_c_bias) {
    Extras extras = {};
    extras.recurrent_mask = pointer(recurrent_mask);
    extras.zone_mask_h = rows(zone_mask_h);
    extras.zone_mask_c = rows(zone_mask_c);
    extras.zoneout_h = zoneout_h;
    extras.zoneout_c = zoneout_c;
    extras.reset = static_cast<const bool*>(pointer(reset));
    extras.reset_h = rows(reset_h);
    extras.reset_c = rows(reset_c);
    of_directions(weight_ch, extras.weight_ch);
    of_directions(ln_hh_weight, extras.ln_hh_weight);
    of_directions(ln_hh_bias, extras.ln_hh_bias);
    of_directions(ln_c_weight, extras.ln_c_weight);
    of_directions(ln_c_bias, extras.ln_c_bias);
    return extras;
}

void run_forward(const Call& call, const std::array<std::int64_t, 5>& sizes, Address lengths, Address order,
                 Address counts, const Layout& gx, const Layout& gates, const Layout& cells, const Layout& y,
                 const Addresses& weight_hh, const Addresses& weight_hr, const Addresses& bias_ih,
                 const Addresses& bias_hh, Address h0, Address h_n, Address c, Address unprojected,
                 const Extras& extras, const Layout& gh, Address u, Address reset_u, Address inner) {
    ForwardSweep sweep = {};
    sweep.sizes = sizes_of(sizes);
    sweep.sequences = {integers(lengths), integers(order), integers(counts)};
    sweep.extras = extras;
    sweep.gx = rows(gx);
    sweep.gates = rows(gates);
    sweep.cells = rows(cells);
    sweep.y = rows(y);
    sweep.gh = rows(gh);
    of_directions(weight_hh, sweep.weight_hh);
    of_directions(weight_hr, sweep.weight_hr);
    of_directions(bias_ih, sweep.bias_ih);
    of_directions(bias_hh, sweep.bias_hh);
    sweep.h0 = pointer(h0);
    sweep.h_n = pointer(h_n);
    sweep.c = pointer(c);
    sweep.unprojected = pointer(unprojected);
    sweep.u = pointer(u);
    sweep.reset_u = pointer(reset_u);
    sweep.inner = pointer(inner);
    run(kPrecisions.at(call.precision).first, sweep, call);
}

// Rows by the names of their fields in BackwardSweep; those that are not named are not there.
void name_rows(const std::map<std::string, Layout>& named, BackwardSweep& sweep) {
    const std::pair<const char*, Rows*> fields[] = {
        {"gates", &sweep.gates},
        {"cells", &sweep.cells},
        {"y", &sweep.y},
        {"gh", &sweep.gh},
        {"dy", &sweep.dy},
        {"dcells", &sweep.dcells},
        {"dgx", &sweep.dgx},
        {"dgh", &sweep.dgh},
        {"dproduct", &sweep.dproduct},
        {"dinner", &sweep.dinner},
        {"h_prev", &sweep.h_prev},
        {"dh_projected", &sweep.dh_projected},
        {"dreset_h", &sweep.dreset_h},
        {"unprojected", &sweep.unprojected},
        {"dreset_c", &sweep.dreset_c},
    };
    std::size_t known = 0;
    for (const auto& [name, field] : fields) {
        const auto found = named.find(name);
        if (found == named.end()) continue;
        *field = rows(found->second);
        ++known;
    }
    if (known != named.size()) throw std::invalid_argument("rows: expected names of fields of BackwardSweep");
}

void run_backward(const Call& call, const std::array<std::int64_t, 5>& sizes, Address lengths, Address order,
                  Address counts, const std::array<std::int64_t, 2>& range, const std::map<std::string, Layout>& rows,
                  const Addresses& weight_hh_t, const Addresses& weight_hr_t, Address h0, Address c0, Address dh,
                  Address dc, Address direct, Address arrived, Address inner, const Extras& extras) {
    BackwardSweep sweep = {};
    sweep.sizes = sizes_of(sizes);
    sweep.sequences = {integers(lengths), integers(order), integers(counts)};
    sweep.extras = extras;
    sweep.begin = range[0];
    sweep.end = range[1];
    name_rows(rows, sweep);
    of_directions(weight_hh_t, sweep.weight_hh_t);
    of_directions(weight_hr_t, sweep.weight_hr_t);
    sweep.h0 = pointer(h0);
    sweep.c0 = pointer(c0);
    sweep.dh = pointer(dh);
    sweep.dc = pointer(dc);
    sweep.direct = pointer(direct);
    sweep.arrived = pointer(arrived);
    sweep.inner = pointer(inner);
    run(kPrecisions.at(call.precision).second, sweep, call);
}

void run_selftest(const std::string& name, Address in, Address out, Address stream) {
    const cudaError_t error =
        selftest(name.c_str(), pointer(in), pointer(out), static_cast<cudaStream_t>(pointer(stream)));
    if (error != cudaSuccess) throw std::runtime_error("rnnkern: self-test " + name + ": " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace rnnkern

PYBIND11_MODULE(RNNKERN_MODULE, module) {
    using namespace pybind11::literals;
    using namespace rnnkern;
    module.doc() = "Sweeps of recurrent layers. Buffers come as addresses and layouts: see sweep.h.";
    py::class_<Call>(module, "Call")
        .def(py::init<std::string, std::string, std::string, int, Address>(), "cell"_a, "precision"_a, "tile"_a,
             "device"_a, "stream"_a);
    const Addresses nowhere;
    const Layout nothing = {};
    py::class_<Extras>(module, "Extras")
        .def(py::init(&extras_of), py::kw_only(), "recurrent_mask"_a = 0, "zone_mask_h"_a = nothing,
             "zone_mask_c"_a = nothing, "zoneout_h"_a = 0.0, "zoneout_c"_a = 0.0, "reset"_a = 0, "reset_h"_a = nothing,
             "reset_c"_a = nothing, "weight_ch"_a = nowhere, "ln_hh_weight"_a = nowhere, "ln_hh_bias"_a = nowhere,
             "ln_c_weight"_a = nowhere, "ln_c_bias"_a = nowhere);
    module.def("forward", run_forward, "call"_a, py::kw_only(), "sizes"_a, "lengths"_a, "order"_a, "counts"_a, "gx"_a,
               "gates"_a, "cells"_a, "y"_a, "weight_hh"_a, "weight_hr"_a, "bias_ih"_a, "bias_hh"_a, "h0"_a, "h_n"_a,
               "c"_a, "unprojected"_a, "extras"_a = Extras{}, "gh"_a = nothing, "u"_a = 0, "reset_u"_a = 0,
               "inner"_a = 0);
    module.def("backward", run_backward, "call"_a, py::kw_only(), "sizes"_a, "lengths"_a, "order"_a, "counts"_a,
               "range"_a, "rows"_a, "weight_hh_t"_a, "weight_hr_t"_a, "h0"_a, "c0"_a, "dh"_a, "dc"_a, "direct"_a,
               "arrived"_a, "inner"_a, "extras"_a);
    module.def("selftest", run_selftest, "name"_a, "input"_a, "output"_a, "stream"_a);
    module.attr("CUDART_VERSION") = CUDART_VERSION;
#ifdef RNNKERN_HOST
    module.def("set_schedule", host::set_schedule, "seed"_a);
#endif
}
