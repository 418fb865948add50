// The second launch of a step with LayerNorm: a block takes the row of one sequence, and thread t its units t, t + 128,
// ...: statistics need whole rows. The first launch leaves, forward, gh = u W_hh^T and, backward, dh of the cell.
//
// LayerNorm of a row x of n numbers, a = (x - mean) / sigma, sigma^2 = the mean of (x - mean)^2, plus epsilon:
//     y = w a + b                     forward
//     da = dy w                       backward
//     dx = (da - mean(da) - a mean(da a)) / sigma
// All G*H numbers of gh are one row; in an LSTM the H numbers v are another. LayerNorm of x W_ih^T depends on no step
// before: torch has it, as it has the sums that are the gradients of w and b.
//
// Shared memory: kThreads / 32 reals, the sums of warps.
#pragma once
#include "backward_unit.cuh"
#include "forward_unit.cuh"

namespace rnnkern {

constexpr double kNormEpsilon = 1e-5;
constexpr int kNormBytes = kThreads / 32 * sizeof(double);

__device__ __forceinline__ float square_root(float x) {
    return sqrtf(x);
}
__device__ __forceinline__ double square_root(double x) {
    return sqrt(x);
}

// The sum over the block, the same in all threads. A barrier: what was written before can be read behind it.
template <class Real>
__device__ __forceinline__ Real block_sum(Real* of_warps, Real x) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
    __syncthreads();  // the sums before have been read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    Real sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warps[warp];
    return sum;
}

// Of a row, in two passes.
template <class Real>
struct Statistics {
    Real mean, over_sigma;

    __device__ __forceinline__ Statistics(Real* of_warps, const Real* row, int64_t count) {
        Real sum = 0, squares = 0;
        for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += row[i];
        mean = block_sum(of_warps, sum) / Real(count);
        for (int64_t i = threadIdx.x; i < count; i += kThreads) squares += (row[i] - mean) * (row[i] - mean);
        over_sigma = 1 / square_root(block_sum(of_warps, squares) / Real(count) + Real(kNormEpsilon));
    }

    __device__ __forceinline__ Real normal(Real x) const { return (x - mean) * over_sigma; }  // a of above
};

// The means over a row that its backward needs.
template <class Real>
struct Means {
    Real of_da, of_da_a;

    __device__ __forceinline__ Means(Real* of_warps, Real sum_da, Real sum_da_a, int64_t count)
        : of_da(block_sum(of_warps, sum_da) / Real(count)), of_da_a(block_sum(of_warps, sum_da_a) / Real(count)) {}

    __device__ __forceinline__ Real dx(Real da, Real a, Real over_sigma) const {
        return (da - of_da - a * of_da_a) * over_sigma;
    }
};

// w and b of a row: w a + b.
template <class Precision>
struct Affine {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    const Element *weight, *bias;

    __device__ __forceinline__ Affine(const void* weight, const void* bias)
        : weight(static_cast<const Element*>(weight)), bias(static_cast<const Element*>(bias)) {}

    __device__ __forceinline__ Real at(int64_t i, Real a) const { return to_real(weight[i]) * a + to_real(bias[i]); }
    __device__ __forceinline__ Real da(int64_t i, Real dy) const { return dy * to_real(weight[i]); }
};

template <class Precision, class Policy>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    forward_norms(const __grid_constant__ ForwardSweep sweep, const __grid_constant__ Step step) {
    using Real = typename Precision::Real;
    RNNKERN_DYNAMIC_SHARED(shared);
    Real* of_warps = reinterpret_cast<Real*>(shared);
    const Place place(sweep.sizes, sweep.sequences, 1, 1);
    const int d = place.direction;
    const int64_t position = place.first_position, sequence = place.sequence(position), hidden = sweep.sizes.hidden;
    const Moment& now = step.now[d];
    if (!place.has(now, position)) return;
    const Extras& extras = sweep.extras;
    const Affine<Precision> affine(extras.ln_hh_weight[d], extras.ln_hh_bias[d]);
    const Real* raw = place.row<const Real>(sweep.gh, now, sequence);
    Real *inner = nullptr, saved[kKept<Policy>];
    if (Policy::kHasC) inner = place.state(static_cast<Real*>(sweep.inner), sequence, hidden);
    const Statistics<Real> of_gh(of_warps, raw, Policy::kGates * hidden);
#pragma unroll 1
    for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
        Real sums[Policy::kGates];
#pragma unroll
        for (int gate = 0; gate < Policy::kGates; ++gate) {
            const int64_t at = gate * hidden + unit;
            sums[gate] = affine.at(at, of_gh.normal(raw[at]));
        }
        const Real v = unit_forward<Precision, Policy>(place, sweep, step, position, unit, sums, saved);
        if (Policy::kHasC) {
            inner[unit] = v;
        } else {
            hand_on<Precision>(place, sweep, step, position, unit, Policy::output(saved, v));
        }
    }
    if constexpr (Policy::kHasC) {
        const Affine<Precision> of_v(extras.ln_c_weight[d], extras.ln_c_bias[d]);
        const Statistics<Real> of_inner(of_warps, inner, hidden);
        const Real* gates = place.row<const Real>(sweep.gates, now, sequence);
#pragma unroll 1
        for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
#pragma unroll
            for (int block = 0; block < kKept<Policy>; ++block) saved[block] = gates[block * hidden + unit];
            const Real v = of_v.at(unit, of_inner.normal(inner[unit]));
            hand_on<Precision>(place, sweep, step, position, unit, Policy::output(saved, v));
        }
    }
}

// From dh of the cell, a row, to all that the step gives but the gradient of u W_hh^T.
template <class Precision, class Policy>
__device__ __forceinline__ void cell_backward(const Place& place, const BackwardSweep& sweep, const Step& step,
                                              typename Precision::Real* of_warps) {
    using Real = typename Precision::Real;
    const int d = place.direction;
    const int64_t position = place.first_position, sequence = place.sequence(position), hidden = sweep.sizes.hidden;
    const Moment &now = step.now[d], &after = step.after[d];
    const Real *arrived = place.state(static_cast<const Real*>(sweep.arrived), sequence, hidden), *straight = nullptr;
    if (sweep.direct != nullptr && sweep.dh_projected.data == nullptr)
        straight = place.state(static_cast<const Real*>(sweep.direct), sequence, hidden);
    const auto unit_at = [&](int64_t unit) {
        Real h = 0;  // an LSTM has no use for it
        if (!Policy::kHasC) h = h_prime<Precision>(place, sweep, now, after, position, unit);
        return BackwardUnit<Precision, Policy>(place, sweep, step, position, unit, h);
    };
    if constexpr (!Policy::kHasC) {
#pragma unroll 1
        for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
            auto at = unit_at(unit);
            at.template finish<Real>(at.through_output(0, arrived[unit]),
                                     straight == nullptr ? Real(0) : straight[unit]);
        }
    } else {
        const Affine<Precision> affine(sweep.extras.ln_c_weight[d], sweep.extras.ln_c_bias[d]);
        Real* inner = place.state(static_cast<Real*>(sweep.inner), sequence, hidden);
#pragma unroll 1
        for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
            const auto at = unit_at(unit);
            inner[unit] = Policy::inner(at.saved, at.around);
        }
        const Statistics<Real> of_inner(of_warps, inner, hidden);
        Real *dinner = place.row<Real>(sweep.dinner, now, sequence), sum_da = 0, sum_da_a = 0;
#pragma unroll 1
        for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
            auto at = unit_at(unit);
            const Real a = of_inner.normal(inner[unit]);
            dinner[unit] = at.through_output(affine.at(unit, a), arrived[unit]);
            const Real da = affine.da(unit, dinner[unit]);
            sum_da += da;
            sum_da_a += da * a;
        }
        const Means<Real> means(of_warps, sum_da, sum_da_a, hidden);
#pragma unroll 1
        for (int64_t unit = threadIdx.x; unit < hidden; unit += kThreads) {
            auto at = unit_at(unit);
            const Real a = of_inner.normal(inner[unit]);
            const Real da = affine.da(unit, at.through_output(affine.at(unit, a), arrived[unit]));
            at.template finish<Real>(means.dx(da, a, of_inner.over_sigma),
                                     straight == nullptr ? Real(0) : straight[unit]);
        }
    }
}

template <class Precision, class Policy>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    backward_norms(const __grid_constant__ BackwardSweep sweep, const __grid_constant__ Step step) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    RNNKERN_DYNAMIC_SHARED(shared);
    Real* of_warps = reinterpret_cast<Real*>(shared);
    const Place place(sweep.sizes, sweep.sequences, 1, 1);
    const int d = place.direction;
    const int64_t position = place.first_position, sequence = place.sequence(position),
                  width = Policy::kGates * sweep.sizes.hidden;
    const Moment& now = step.now[d];
    if (!place.has(now, position)) return;
    cell_backward<Precision, Policy>(place, sweep, step, of_warps);
    const Affine<Precision> affine(sweep.extras.ln_hh_weight[d], sweep.extras.ln_hh_bias[d]);
    const Real* raw = place.row<const Real>(sweep.gh, now, sequence);
    const Real* dgh = place.row<const Real>(sweep.dgh, now, sequence);
    const Statistics<Real> of_gh(of_warps, raw, width);  // behind its barriers dgh is there
    Real sum_da = 0, sum_da_a = 0;
    for (int64_t i = threadIdx.x; i < width; i += kThreads) {
        const Real da = affine.da(i, dgh[i]);
        sum_da += da;
        sum_da_a += da * of_gh.normal(raw[i]);
    }
    const Means<Real> means(of_warps, sum_da, sum_da_a, width);
    Element* dproduct = place.row<Element>(sweep.dproduct, now, sequence);
    for (int64_t i = threadIdx.x; i < width; i += kThreads)
        store(dproduct + i, means.dx(affine.da(i, dgh[i]), of_gh.normal(raw[i]), of_gh.over_sigma));
}

}  // namespace rnnkern
