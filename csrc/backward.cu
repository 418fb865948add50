// The backward sweep of the general tier: any size, one launch a step (two with a projection), and one more at the end
// for dh0.
//
// Let s be the step that the forward sweep took after t. In the launch of step t a block takes a tile of sequences and
// units, and forms
//     dh = dgh[s] W_hh + direct[s] + dy[t]            for sequences that have step s
//     dh = dh_n + dy[t]                               for those whose last step t is
// the product by product.cuh with W_hh transposed, the rest where the sums are, in registers. There it goes on to the
// cell:
//     dgx[t], dgh[t], dc, direct[t] = cell backward(gates[t], c[t], h_prev, c_prev, dh, dc)
// For sequences that have step s but not t, the first of the forward sweep was s, and dh is dh0. dc and direct are
// changed in place, a number for each unit; dgh is written in rows of step t and read in rows of step s: no number is
// read and written by two blocks of one launch.
//
// With a projection h = W_hr u, the product above gives the gradient of the projected h, which the first launch keeps
// as dh_projected[t]; the second forms
//     du = dh_projected[t] W_hr
// and goes on to the cell. What is left to torch are sums over all rows: dW_ih = dgx^T x, dW_hh = dgh^T h_prev, dW_hr =
// dh_projected^T u, db = sums of dgx and dgh, and dx = dgx W_ih. For them the sweep gathers h_prev, what met W_hh, and
// u.
#include "cells.cuh"
#include "launch.cuh"

namespace rnnkern {
namespace {

// dh of what a step gave, before its own dy: `sum` is that of the product. For a sequence that begins here, dh_n.
template <class Precision>
__device__ __forceinline__ typename Precision::Real dh_from_after(const Place& place, const BackwardSweep& sweep,
                                                                  const Step& step, int64_t position, int64_t unit,
                                                                  typename Precision::Real sum) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const int64_t sequence = place.sequence(position), outputs = sweep.sizes.outputs;
    if (place.has(step.before[place.direction], position)) {
        return sweep.direct == nullptr
                   ? sum
                   : sum + place.state(static_cast<const Real*>(sweep.direct), sequence, outputs)[unit];
    }
    return sweep.dh_n == nullptr
               ? Real(0)
               : to_real(place.state(static_cast<const Element*>(sweep.dh_n), sequence, outputs)[unit]);
}

// Copies one number of what met W_hh, the output of the step after or h0, to the row of this step.
template <class Precision>
__device__ __forceinline__ void gather_h_prev(const Place& place, const BackwardSweep& sweep, const Step& step,
                                              int64_t position, int64_t unit) {
    using Element = typename Precision::Element;
    const Moment &now = step.now[place.direction], &after = step.after[place.direction];
    const int64_t sequence = place.sequence(position);
    const Element* from = place.has(after, position)
                              ? place.row<const Element>(sweep.y, after, sequence)
                              : place.state(static_cast<const Element*>(sweep.h0), sequence, sweep.sizes.outputs);
    place.row<Element>(sweep.h_prev, now, sequence)[unit] = from[unit];
}

// What a step's cell does backward to one unit of one sequence.
template <class Precision, class Policy>
__device__ __forceinline__ void unit_backward(const Place& place, const BackwardSweep& sweep, const Step& step,
                                              int64_t position, int64_t unit, typename Precision::Real dh) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const int64_t hidden = sweep.sizes.hidden, sequence = place.sequence(position);
    const int d = place.direction;
    const Moment &now = step.now[d], &after = step.after[d];
    const bool begins = !place.has(after, position);  // with c0
    Met<Real> met = {};
    if (sweep.dh_projected.data == nullptr) {  // else the unit is none of h
        met.h = to_real(place.row<Element>(sweep.y, now, sequence)[unit]);
        met.h_prev = to_real(place.row<Element>(sweep.h_prev, now, sequence)[unit]);
    }
    Real saved[Policy::kSaved + 1], dgx[Policy::kGates], dgh[Policy::kGates], dc = 0, direct = 0;
    if (Policy::kSaved > 0) {
        const Real* gates = place.row<const Real>(sweep.gates, now, sequence) + unit;
#pragma unroll
        for (int block = 0; block < Policy::kSaved; ++block) saved[block] = gates[block * hidden];
    }
    if constexpr (Policy::kHasC) {
        met.c = place.row<const Real>(sweep.cells, now, sequence)[unit];
        met.c_prev = begins ? place.state(static_cast<const Real*>(sweep.c0), sequence, hidden)[unit]
                            : place.row<const Real>(sweep.cells, after, sequence)[unit];
        dc = place.state(static_cast<Real*>(sweep.dc), sequence, hidden)[unit];
        if (sweep.unprojected.data != nullptr)
            store(place.row<Element>(sweep.unprojected, now, sequence) + unit, Policy::output(saved, met.c));
    }
    Policy::backward(saved, met, dh, dc, direct, dgx, dgh);
    if (Policy::kHasC) place.state(static_cast<Real*>(sweep.dc), sequence, hidden)[unit] = dc;
    if (sweep.direct != nullptr) place.state(static_cast<Real*>(sweep.direct), sequence, hidden)[unit] = direct;
    Element *to_dgx = place.row<Element>(sweep.dgx, now, sequence) + unit,
            *to_dgh = place.row<Element>(sweep.dgh, now, sequence) + unit;
#pragma unroll
    for (int gate = 0; gate < Policy::kGates; ++gate) {
        store(to_dgx + gate * hidden, dgx[gate]);
        if (Policy::kSeparate) store(to_dgh + gate * hidden, dgh[gate]);
    }
}

// Rows of dgh in the step before, what the product of a launch goes over; null where a sequence has no such step.
template <class Precision>
__device__ __forceinline__ const typename Precision::Element* dgh_before(const Place& place, const BackwardSweep& sweep,
                                                                         const Step& step, int64_t position) {
    const Moment& before = step.before[place.direction];
    return place.has(before, position)
               ? place.row<const typename Precision::Element>(sweep.dgh, before, place.sequence(position))
               : nullptr;
}

// The first launch of a step, the only one without a projection: goes over the outputs, which are the units then.
template <class Precision, class Policy, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    backward_step(const __grid_constant__ BackwardSweep sweep, const __grid_constant__ Step step, const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment &before = step.before[place.direction], &now = step.now[place.direction];
    if (!place.has(before, place.first_position) && !place.has(now, place.first_position)) return;
    const int64_t outputs = sweep.sizes.outputs, depth = Policy::kGates * sweep.sizes.hidden;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh_t[place.direction]);
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, step.first ? 0 : depth, aligned, weight,
        [&](int row) { return dgh_before<Precision>(place, sweep, step, place.first_position + row); },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < outputs ? weight + u * depth : nullptr;
        });
    tile.each([&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        const bool has_now = place.has(now, position);
        if (u >= outputs || !(has_now || place.has(before, position))) return;
        const int64_t sequence = place.sequence(position);
        Real dh = dh_from_after<Precision>(place, sweep, step, position, u, sums[0]);
        if (!has_now) {
            store(place.state(static_cast<Element*>(sweep.dh0), sequence, outputs) + u, dh);
            return;
        }
        gather_h_prev<Precision>(place, sweep, step, position, u);
        if (sweep.dy.data != nullptr) dh += to_real(place.row<const Element>(sweep.dy, now, sequence)[u]);
        if (sweep.dh_projected.data != nullptr) {
            store(place.row<Element>(sweep.dh_projected, now, sequence) + u, dh);
        } else {
            unit_backward<Precision, Policy>(place, sweep, step, position, u, dh);
        }
    });
}

// The second launch of a step with a projection.
template <class Precision, class Policy, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    backward_projected_step(const __grid_constant__ BackwardSweep sweep, const __grid_constant__ Step step,
                            const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment& now = step.now[place.direction];
    if (!place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, outputs = sweep.sizes.outputs;
    const Element* weight = static_cast<const Element*>(sweep.weight_hr_t[place.direction]);
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, outputs, aligned, weight,
        [&](int row) -> const Element* {
            const int64_t position = place.first_position + row;
            return place.has(now, position)
                       ? place.row<const Element>(sweep.dh_projected, now, place.sequence(position))
                       : nullptr;
        },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + u * outputs : nullptr;
        });
    tile.each([&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u < hidden && place.has(now, position))
            unit_backward<Precision, Policy>(place, sweep, step, position, u, sums[0]);
    });
}

// Whether the operands of a sweep's products can be read by vectors.
struct Alignment {
    bool recurrent = true, projection = true;
};

template <class Element>
Alignment alignment(const BackwardSweep& sweep, int64_t depth) {
    constexpr int64_t kSize = sizeof(Element);
    Alignment found;
    found.recurrent = aligned_rows(sweep.dgh, kSize, depth);
    if (sweep.dh_projected.data != nullptr)
        found.projection = aligned_rows(sweep.dh_projected, kSize, sweep.sizes.outputs);
    for (int d = 0; d < sweep.sizes.directions; ++d) {
        found.recurrent = found.recurrent && aligned_pointer(sweep.weight_hh_t[d]);
        found.projection = found.projection && aligned_pointer(sweep.weight_hr_t[d]);
    }
    return found;
}

template <class Precision, class Policy, bool kLarge>
Failure sweep_backward(const BackwardSweep& sweep, void* stream) {
    using Tile = typename TileOf<Precision, 1, kLarge>::Type;
    constexpr int kBytes = Product<Tile, 1>::kSharedBytes;
    const Sizes& sizes = sweep.sizes;
    const Alignment aligned = alignment<typename Precision::Element>(sweep, Policy::kGates * sizes.hidden);
    const Steps steps(sizes, sweep.sequences);
    Launcher launch(stream);
    const auto first = backward_step<Precision, Policy, kLarge>;
    const bool projected = sweep.dh_projected.data != nullptr;
    launch.allow("backward_step", first, kBytes);
    if constexpr (Policy::kHasC)
        launch.allow("backward_projected_step", backward_projected_step<Precision, Policy, kLarge>, kBytes);
    for (int64_t n = 0; n <= sizes.steps; ++n) {
        const Step step = steps.at(n, true);
        const int64_t positions = steps.most(step);
        launch("backward_step", first, kBytes, sizes, positions, Tile::kRows, sizes.outputs, Tile::kUnits, sweep, step,
               aligned.recurrent);
        if constexpr (Policy::kHasC) {  // no other cell has a projection
            if (!projected || n == sizes.steps) continue;
            const auto second = backward_projected_step<Precision, Policy, kLarge>;
            launch("backward_projected_step", second, kBytes, sizes, positions, Tile::kRows, sizes.hidden, Tile::kUnits,
                   sweep, step, aligned.projection);
        }
    }
    return launch.failure();
}

}  // namespace

template <class Precision>
Failure backward(const BackwardSweep& sweep, const char* cell, Tile tile, void* stream) {
    Failure failure = {cudaErrorInvalidValue, "of no such cell", 0};
    with_cell<typename Precision::Real>(cell, [&](auto policy) {
        using Policy = decltype(policy);
        using Large = typename TileOf<Precision, 1, true>::Type;
        failure = takes_large(tile, sweep.sizes, Large::kRows, Large::kUnits)
                      ? sweep_backward<Precision, Policy, true>(sweep, stream)
                      : sweep_backward<Precision, Policy, false>(sweep, stream);
    });
    return failure;
}

template Failure backward<precision::RNNKERN_PRECISION>(const BackwardSweep&, const char*, Tile, void*);

}  // namespace rnnkern
