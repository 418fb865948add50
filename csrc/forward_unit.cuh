// What the forward sweep does to one unit of one sequence, from its pre-activations to the u of the next step: what the
// kernels of forward.cu, layer_norm.cuh and reset_before.cu share.
#pragma once
#include "states.cuh"

namespace rnnkern {

// The row that meets W_hh in a step. u of the launches is double buffered: a launch reads one half and writes the
// other.
template <class Precision>
__device__ __forceinline__ const typename Precision::Element* u_row(const Place& place, const ForwardSweep& sweep,
                                                                    const Step& step, int64_t position) {
    using Element = typename Precision::Element;
    const Sizes& sizes = sweep.sizes;
    if (sweep.u == nullptr) return h_before<Precision>(place, sweep, step.before[place.direction], position);
    const Element* half =
        static_cast<const Element*>(sweep.u) + step.number % 2 * sizes.directions * sizes.batch * sizes.outputs;
    return place.state(half, place.sequence(position), sizes.outputs);
}

// Ends a step for one output: zoneout, the output, and the final state or what the next step meets. `h` is projected.
template <class Precision>
__device__ __forceinline__ void finish(const Place& place, const ForwardSweep& sweep, const Step& step,
                                       int64_t position, int64_t unit, typename Precision::Real h) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const Extras& extras = sweep.extras;
    const Sizes& sizes = sweep.sizes;
    const int d = place.direction;
    const Moment &now = step.now[d], &after = step.after[d];
    const int64_t sequence = place.sequence(position);
    const Zone<Real> zone = zone_of<Real>(place, extras.zone_mask_h, extras.zoneout_h, now, sequence, unit);
    if (zone.keeps || zone.share != 0)
        h = zone.mix(h_prime<Precision>(place, sweep, now, step.before[d], position, unit), h);
    Element rounded;
    store(&rounded, h);
    place.row<Element>(sweep.y, now, sequence)[unit] = rounded;
    if (!place.has(after, position)) {
        place.state(static_cast<Element*>(sweep.h_n), sequence, sizes.outputs)[unit] = rounded;
    } else if (sweep.u != nullptr) {
        Element* half =
            static_cast<Element*>(sweep.u) + (step.number + 1) % 2 * sizes.directions * sizes.batch * sizes.outputs;
        const Real next = resets(place, extras, after, sequence)
                              ? reset_state<Element>(place, extras.reset_h, after, sequence, unit)
                              : to_real(rounded);
        store(place.state(half, sequence, sizes.outputs) + unit,
              masked<Precision>(place, extras, sequence, unit, next));
    }
}

// Hands on what the cell gives: to the projection, or as the output.
template <class Precision>
__device__ __forceinline__ void hand_on(const Place& place, const ForwardSweep& sweep, const Step& step,
                                        int64_t position, int64_t unit, typename Precision::Real h) {
    using Element = typename Precision::Element;
    if (sweep.unprojected != nullptr) {
        const int64_t sequence = place.sequence(position), hidden = sweep.sizes.hidden;
        store(place.state(static_cast<Element*>(sweep.unprojected), sequence, hidden) + unit, h);
    } else {
        finish<Precision>(place, sweep, step, position, unit, h);
    }
}

// gx of one unit and gate, `at` of its row, with its bias.
template <class Precision>
__device__ __forceinline__ typename Precision::Real biased(const void* bias, int64_t at, typename Precision::Real x) {
    return bias == nullptr ? x : x + to_real(static_cast<const typename Precision::Element*>(bias)[at]);
}

// The cell of one unit up to what Policy::output takes, which it returns; `sums` are those of W_hh, a number a gate.
template <class Precision, class Policy>
__device__ __forceinline__ typename Precision::Real unit_forward(const Place& place, const ForwardSweep& sweep,
                                                                 const Step& step, int64_t position, int64_t unit,
                                                                 const typename Precision::Real* sums,
                                                                 typename Precision::Real* saved) {
    using Real = typename Precision::Real;
    const int64_t hidden = sweep.sizes.hidden, sequence = place.sequence(position);
    const int d = place.direction;
    const Moment& now = step.now[d];
    const Real* from = place.row<const Real>(sweep.gx, now, sequence) + unit;
    Real gx[Policy::kGates], gh[Policy::kGates], c = 0;
#pragma unroll
    for (int gate = 0; gate < Policy::kGates; ++gate) {
        gx[gate] = biased<Precision>(sweep.bias_ih[d], gate * hidden + unit, from[gate * hidden]);
        gh[gate] = biased<Precision>(sweep.bias_hh[d], gate * hidden + unit, sums[gate]);
    }
    Around<Real> around;
    Real* carried = nullptr;
    if constexpr (Policy::kHasC) {
        carried = place.state(static_cast<Real*>(sweep.c), sequence, hidden) + unit;
        around = around_unit<Precision>(place, sweep.extras, now, sequence, unit, *carried);
    } else {
        around.h_prev = h_prime<Precision>(place, sweep, now, step.before[d], position, unit);
    }
    const Real v = Policy::forward(gx, gh, around, c, saved);
    if (Policy::kHasC) *carried = c;
    if (sweep.cells.data != nullptr) place.row<Real>(sweep.cells, now, sequence)[unit] = c;
    if (sweep.gates.data != nullptr) {
        Real* gates = place.row<Real>(sweep.gates, now, sequence) + unit;
#pragma unroll
        for (int block = 0; block < kKept<Policy>; ++block) gates[block * hidden] = saved[block];
    }
    return v;
}

}  // namespace rnnkern
