// The forward sweep of the general tier: any size, one launch a step (two with a projection), no state on the chip
// between launches.
//
// In step t a block takes a tile of sequences and units, forms  gh = h_prev W_hh^T  for all gates of these units
// (product.cuh), and goes on to the cell with the sums still in registers:
//     h, c = cell(gx + b_ih, gh + b_hh, h_prev, c)
// h_prev is read from y, where the step before has written it, or h0; c is in a buffer of its own, a number for each
// unit, and changed in place; gates go where gx was. So nothing is read and written by two blocks of one launch. With a
// projection h goes to `unprojected`, and the second launch writes
//     y = h W_hr^T.
#include "cells.cuh"
#include "launch.cuh"

namespace rnnkern {
namespace {

template <class Precision>
__device__ __forceinline__ const typename Precision::Element* h_before(const Place& place, const ForwardSweep& sweep,
                                                                       const Step& step, int64_t position) {
    using Element = typename Precision::Element;
    const Moment& before = step.before[place.direction];
    const int64_t sequence = place.sequence(position);
    if (place.has(before, position)) return place.row<Element>(sweep.y, before, sequence);
    return place.state(static_cast<const Element*>(sweep.h0), sequence, sweep.sizes.outputs);
}

// What a step's cell does to one unit of one sequence; `sums` are those of W_hh, a number a gate.
template <class Precision, class Policy>
__device__ __forceinline__ void unit_forward(const Place& place, const ForwardSweep& sweep, const Step& step,
                                             int64_t position, int64_t unit, const typename Precision::Real* sums) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const int64_t hidden = sweep.sizes.hidden, sequence = place.sequence(position);
    const int d = place.direction;
    const Moment& now = step.now[d];
    const Real* from = place.row<const Real>(sweep.gx, now, sequence) + unit;
    const Element *bias_ih = static_cast<const Element*>(sweep.bias_ih[d]),
                  *bias_hh = static_cast<const Element*>(sweep.bias_hh[d]);
    Real gx[Policy::kGates], gh[Policy::kGates];
#pragma unroll
    for (int gate = 0; gate < Policy::kGates; ++gate) {
        gx[gate] = from[gate * hidden] + (bias_ih == nullptr ? Real(0) : to_real(bias_ih[gate * hidden + unit]));
        gh[gate] = sums[gate] + (bias_hh == nullptr ? Real(0) : to_real(bias_hh[gate * hidden + unit]));
    }
    const bool projected = sweep.unprojected != nullptr;
    const Real h_prev = projected ? Real(0) : to_real(h_before<Precision>(place, sweep, step, position)[unit]);
    Real* carried = Policy::kHasC ? place.state(static_cast<Real*>(sweep.c), sequence, hidden) + unit : nullptr;
    Real c = Policy::kHasC ? *carried : Real(0), saved[Policy::kSaved + 1];
    const Real h = Policy::forward(gx, gh, h_prev, c, saved);
    if (Policy::kHasC) *carried = c;
    if (sweep.cells.data != nullptr) place.row<Real>(sweep.cells, now, sequence)[unit] = c;
    if (sweep.gates.data != nullptr) {
        Real* gates = place.row<Real>(sweep.gates, now, sequence) + unit;
#pragma unroll
        for (int block = 0; block < Policy::kSaved; ++block) gates[block * hidden] = saved[block];
    }
    if (projected) {
        store(place.state(static_cast<Element*>(sweep.unprojected), sequence, hidden) + unit, h);
        return;
    }
    store(place.row<Element>(sweep.y, now, sequence) + unit, h);
    if (!place.has(step.after[d], position))
        store(place.state(static_cast<Element*>(sweep.h_n), sequence, hidden) + unit, h);
}

template <class Precision, class Policy, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    forward_step(const __grid_constant__ ForwardSweep sweep, const __grid_constant__ Step step, const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, Policy::kGates, kLarge>::Type;
    using OwnProduct = Product<OwnTile, Policy::kGates>;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment& now = step.now[place.direction];
    if (!place.has(now, place.first_position)) return;  // the longest of the tile
    const int64_t hidden = sweep.sizes.hidden, outputs = sweep.sizes.outputs;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh[place.direction]);
    OwnTile tile;
    OwnProduct::run(
        tile, shared, outputs, aligned, weight,
        [&](int row) {
            const int64_t position = place.first_position + row;
            return place.has(now, position) ? h_before<Precision>(place, sweep, step, position) : nullptr;
        },
        [&](int gate, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + (gate * hidden + u) * outputs : nullptr;
        });
    tile.each([&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u < hidden && place.has(now, position))
            unit_forward<Precision, Policy>(place, sweep, step, position, u, sums);
    });
}

template <class Precision, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    forward_projection(const __grid_constant__ ForwardSweep sweep, const __grid_constant__ Step step,
                       const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment &now = step.now[place.direction], &after = step.after[place.direction];
    if (!place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, outputs = sweep.sizes.outputs;
    const Element* weight = static_cast<const Element*>(sweep.weight_hr[place.direction]);
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, hidden, aligned, weight,
        [&](int row) -> const Element* {
            const int64_t position = place.first_position + row;
            if (!place.has(now, position)) return nullptr;
            return place.state(static_cast<const Element*>(sweep.unprojected), place.sequence(position), hidden);
        },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < outputs ? weight + u * hidden : nullptr;
        });
    tile.each([&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u >= outputs || !place.has(now, position)) return;
        const int64_t sequence = place.sequence(position);
        store(place.row<Element>(sweep.y, now, sequence) + u, sums[0]);
        if (!place.has(after, position))
            store(place.state(static_cast<Element*>(sweep.h_n), sequence, outputs) + u, sums[0]);
    });
}

template <class Precision, class Policy, bool kLarge>
Failure sweep_forward(const ForwardSweep& sweep, void* stream) {
    using Element = typename Precision::Element;
    using StepTile = typename TileOf<Precision, Policy::kGates, kLarge>::Type;
    using ProjectionTile = typename TileOf<Precision, 1, kLarge>::Type;
    constexpr int kStepBytes = Product<StepTile, Policy::kGates>::kSharedBytes,
                  kProjectionBytes = Product<ProjectionTile, 1>::kSharedBytes;
    constexpr int64_t kSize = sizeof(Element);
    const Sizes& sizes = sweep.sizes;
    bool aligned = aligned_rows(sweep.y, kSize, sizes.outputs) && aligned_rows(sweep.h0, kSize, sizes.outputs, {}),
         aligned_projection = true;
    for (int d = 0; d < sizes.directions; ++d) {
        aligned = aligned && aligned_pointer(sweep.weight_hh[d]);
        aligned_projection = aligned_projection && aligned_rows(sweep.weight_hr[d], kSize, sizes.hidden, {});
    }
    aligned_projection = aligned_projection && aligned_pointer(sweep.unprojected);

    const Steps steps(sizes, sweep.sequences);
    Launcher launch(stream);
    launch.allow("forward_step", forward_step<Precision, Policy, kLarge>, kStepBytes);
    launch.allow("forward_projection", forward_projection<Precision, kLarge>, kProjectionBytes);
    for (int64_t n = 0; n < sizes.steps; ++n) {
        const Step step = steps.at(n, false);
        const int64_t positions = steps.most(step);
        launch("forward_step", forward_step<Precision, Policy, kLarge>, kStepBytes, sizes, positions, StepTile::kRows,
               sizes.hidden, StepTile::kUnits, sweep, step, aligned);
        if (sweep.unprojected == nullptr) continue;
        launch("forward_projection", forward_projection<Precision, kLarge>, kProjectionBytes, sizes, positions,
               ProjectionTile::kRows, sizes.outputs, ProjectionTile::kUnits, sweep, step, aligned_projection);
    }
    return launch.failure();
}

}  // namespace

template <class Precision>
Failure forward(const ForwardSweep& sweep, const char* cell, Tile tile, void* stream) {
    Failure failure = {cudaErrorInvalidValue, "of no such cell", 0};
    with_cell<typename Precision::Real>(cell, [&](auto policy) {
        using Policy = decltype(policy);
        using Large = typename TileOf<Precision, Policy::kGates, true>::Type;
        failure = takes_large(tile, sweep.sizes, Large::kRows, Large::kUnits)
                      ? sweep_forward<Precision, Policy, true>(sweep, stream)
                      : sweep_forward<Precision, Policy, false>(sweep, stream);
    });
    return failure;
}

template Failure forward<precision::RNNKERN_PRECISION>(const ForwardSweep&, const char*, Tile, void*);

}  // namespace rnnkern
