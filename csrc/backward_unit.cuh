// What the backward sweep does to one unit of one sequence, from the gradient that arrives at its h to those of its
// pre-activations: what the kernels of backward.cu, layer_norm.cuh and reset_before.cu share.
#pragma once
#include "states.cuh"

namespace rnnkern {

template <class Real>
struct Arrived {
    Real dh;        // of what the cell and the projection give
    Real straight;  // what of it zoneout gives to h'
    Real h_prime;
};

// The gradient of one output of a step; `sum` is that of the product. False: the sequence has no such step, and what
// arrives is carried on. Leaves u of the step in h_prev.
template <class Precision>
__device__ __forceinline__ bool arrive(const Place& place, const BackwardSweep& sweep, const Step& step,
                                       int64_t position, int64_t unit, typename Precision::Real sum,
                                       Arrived<typename Precision::Real>& found) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const Extras& extras = sweep.extras;
    const int d = place.direction;
    const Moment &before = step.before[d], &now = step.now[d];
    const int64_t sequence = place.sequence(position), outputs = sweep.sizes.outputs;
    Real* carried = place.state(static_cast<Real*>(sweep.dh), sequence, outputs) + unit;
    Real dh;
    if (place.has(before, position)) {
        dh = masked<Precision>(place, extras, sequence, unit, sum);
        if (sweep.direct != nullptr) dh += place.state(static_cast<const Real*>(sweep.direct), sequence, outputs)[unit];
        if (resets(place, extras, before, sequence)) {
            if (sweep.dreset_h.data != nullptr) place.row<Real>(sweep.dreset_h, before, sequence)[unit] += dh;
            dh = 0;
        }
    } else {
        dh = *carried;
    }
    if (!place.has(now, position)) {
        *carried = dh;
        return false;
    }
    if (sweep.dy.data != nullptr) dh += to_real(place.row<const Element>(sweep.dy, now, sequence)[unit]);
    const Zone<Real> zone = zone_of<Real>(place, extras.zone_mask_h, extras.zoneout_h, now, sequence, unit);
    found.dh = zone.of_fresh(dh);
    found.straight = zone.of_old(dh);
    found.h_prime = h_prime<Precision>(place, sweep, now, step.after[d], position, unit);
    store(place.row<Element>(sweep.h_prev, now, sequence) + unit,
          masked<Precision>(place, extras, sequence, unit, found.h_prime));
    return true;
}

// A unit of a step that has arrived: what the step saved, and the way on.
template <class Precision, class Policy>
struct BackwardUnit {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;

    const Place& place;
    const BackwardSweep& sweep;
    const Moment& now;
    int64_t sequence, unit;
    Real saved[kKept<Policy>], dgx[Policy::kGates];
    Around<Real> around;

    __device__ __forceinline__ BackwardUnit(const Place& place, const BackwardSweep& sweep, const Step& step,
                                            int64_t position, int64_t unit, Real h_prime)
        : place(place), sweep(sweep), now(step.now[place.direction]), sequence(place.sequence(position)), unit(unit) {
        const int64_t hidden = sweep.sizes.hidden;
        if (Policy::kSaved > 0 || sweep.gates.data != nullptr) {
            const Real* gates = place.row<const Real>(sweep.gates, now, sequence) + unit;
#pragma unroll
            for (int block = 0; block < kKept<Policy>; ++block) saved[block] = gates[block * hidden];
        } else {
            saved[0] = to_real(place.row<const Element>(sweep.y, now, sequence)[unit]);
        }
        if constexpr (Policy::kHasC) {
            const Moment& after = step.after[place.direction];
            const Real c_before = place.has(after, position)
                                      ? place.row<const Real>(sweep.cells, after, sequence)[unit]
                                      : place.state(static_cast<const Real*>(sweep.c0), sequence, hidden)[unit];
            around = around_unit<Precision>(place, sweep.extras, now, sequence, unit, c_before);
        }
        around.h_prev = h_prime;
    }

    // What reaches v, normalised if it is, from `dh`.
    __device__ __forceinline__ Real through_output(Real v, Real dh) {
        if (Policy::kHasC && sweep.unprojected.data != nullptr)
            store(place.row<Element>(sweep.unprojected, now, sequence) + unit, Policy::output(saved, v));
        return Policy::output_backward(saved, v, dh, dgx);
    }

    // Goes on from dv to all that this step gives; `Stored` is what the rows of dgx and dgh hold.
    template <class Stored>
    __device__ __forceinline__ void finish(Real dv, Real straight) {
        const int64_t hidden = sweep.sizes.hidden;
        Real dc = 0, direct = 0, dgh[Policy::kGates], *carried = nullptr;
        if constexpr (Policy::kHasC) {
            carried = place.state(static_cast<Real*>(sweep.dc), sequence, hidden) + unit;
            dc = *carried;
            if (sweep.dcells.data != nullptr) dc += place.row<const Real>(sweep.dcells, now, sequence)[unit];
        }
        Policy::backward(saved, around, dv, dc, direct, dgx, dgh);
        if constexpr (Policy::kHasC) {
            if (resets(place, sweep.extras, now, sequence)) {
                if (sweep.dreset_c.data != nullptr) place.row<Real>(sweep.dreset_c, now, sequence)[unit] += dc;
                dc = 0;
            }
            *carried = dc;
        }
        if (sweep.direct != nullptr && sweep.dh_projected.data == nullptr)  // else the unit is none of h
            place.state(static_cast<Real*>(sweep.direct), sequence, hidden)[unit] = straight + direct;
        Stored *to_dgx = place.row<Stored>(sweep.dgx, now, sequence) + unit,
               *to_dgh = place.row<Stored>(sweep.dgh, now, sequence) + unit;
#pragma unroll
        for (int gate = 0; gate < Policy::kGates; ++gate) {
            store(to_dgx + gate * hidden, dgx[gate]);
            if (Policy::kSeparate) store(to_dgh + gate * hidden, dgh[gate]);
        }
    }
};

// Rows of the gradient of u W_hh^T in the step before, what the product of a launch goes over; null where a sequence
// has no such step.
template <class Precision>
__device__ __forceinline__ const typename Precision::Element* dproduct_before(const Place& place,
                                                                              const BackwardSweep& sweep,
                                                                              const Step& step, int64_t position) {
    const Moment& before = step.before[place.direction];
    return place.has(before, position)
               ? place.row<const typename Precision::Element>(sweep.dproduct, before, place.sequence(position))
               : nullptr;
}

}  // namespace rnnkern
