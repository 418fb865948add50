// What happens to a state between two steps, for both sweeps: resets, the recurrent mask, zoneout.
//
//     h' = what a reset gives, where the step has one, else the h of the step before
//     u  = h' times the recurrent mask, which meets W_hh
//     h  = zone(h', what the cell and the projection give)
// and c likewise without the mask. Old values are chosen, not multiplied by zero: NaN in a state that a reset or a mask
// replaces goes nowhere.
#pragma once
#include "cells.cuh"
#include "launch.cuh"

namespace rnnkern {

// Of one number of a row.
template <class Real>
__device__ __forceinline__ Zone<Real> zone_of(const Place& place, const Rows& mask, double share, const Moment& now,
                                              int64_t sequence, int64_t unit) {
    Zone<Real> zone;
    if (mask.data != nullptr) {
        zone.keeps = place.row<const bool>(mask, now, sequence)[unit];
    } else {
        zone.share = Real(share);
    }
    return zone;
}

// Whether the states of a sequence are replaced before a step.
__device__ __forceinline__ bool resets(const Place& place, const Extras& extras, const Moment& now, int64_t sequence) {
    return extras.reset != nullptr && extras.reset[now.index * place.sizes.batch + sequence];
}

// One number of the state that a reset gives; `Stored` is what the rows hold.
template <class Stored>
__device__ __forceinline__ auto reset_state(const Place& place, const Rows& given, const Moment& now, int64_t sequence,
                                            int64_t unit) -> decltype(to_real(Stored())) {
    if (given.data == nullptr) return 0;
    return to_real(place.row<const Stored>(given, now, sequence)[unit]);
}

// The row of h that a step finds: that of `previous`, the step before in the order of the forward sweep, or h0.
template <class Precision, class Sweep>
__device__ __forceinline__ const typename Precision::Element* h_before(const Place& place, const Sweep& sweep,
                                                                       const Moment& previous, int64_t position) {
    using Element = typename Precision::Element;
    const int64_t sequence = place.sequence(position);
    if (place.has(previous, position)) return place.row<const Element>(sweep.y, previous, sequence);
    return place.state(static_cast<const Element*>(sweep.h0), sequence, sweep.sizes.outputs);
}

// One number of h'.
template <class Precision, class Sweep>
__device__ __forceinline__ typename Precision::Real h_prime(const Place& place, const Sweep& sweep, const Moment& now,
                                                            const Moment& previous, int64_t position, int64_t unit) {
    const int64_t sequence = place.sequence(position);
    if (resets(place, sweep.extras, now, sequence))
        return reset_state<typename Precision::Element>(place, sweep.extras.reset_h, now, sequence, unit);
    return to_real(h_before<Precision>(place, sweep, previous, position)[unit]);
}

// One number of u, or of what its gradient gives to h'.
template <class Precision>
__device__ __forceinline__ typename Precision::Real masked(const Place& place, const Extras& extras, int64_t sequence,
                                                           int64_t unit, typename Precision::Real h) {
    using Element = typename Precision::Element;
    const Element* mask = static_cast<const Element*>(extras.recurrent_mask);
    return mask == nullptr ? h : h * to_real(place.state(mask, sequence, place.sizes.outputs)[unit]);
}

// What a unit of a cell with a c meets in a step, but for h'; `c_before` is the c of the step before.
template <class Precision>
__device__ __forceinline__ Around<typename Precision::Real> around_unit(const Place& place, const Extras& extras,
                                                                        const Moment& now, int64_t sequence,
                                                                        int64_t unit,
                                                                        typename Precision::Real c_before) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const int64_t hidden = place.sizes.hidden;
    Around<Real> around;
    around.c_prev =
        resets(place, extras, now, sequence) ? reset_state<Real>(place, extras.reset_c, now, sequence, unit) : c_before;
    around.zone_c = zone_of<Real>(place, extras.zone_mask_c, extras.zoneout_c, now, sequence, unit);
    const Element* weights = static_cast<const Element*>(extras.weight_ch[place.direction]);
    around.peepholes.there = weights != nullptr;
    if (around.peepholes.there) {
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) around.peepholes.weights[gate] = to_real(weights[gate * hidden + unit]);
    }
    return around;
}

}  // namespace rnnkern
