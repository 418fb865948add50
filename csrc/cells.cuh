// The cells, a policy struct each: what one unit does in one step, forward and backward, under the equations it
// implements. Every tier uses them as they are.
//
// gx and gh are the pre-activations W_ih x + b_ih and W_hh h + b_hh of the unit, one number a gate; `saved` is what the
// step keeps for backward, kSaved numbers. Backward gets dh, the gradient of h, and gives those of gx and gh. `direct`
// is what of dh reaches the h before without going through W_hh.
#pragma once
#include <cuda_runtime.h>

#include <cstring>

namespace rnnkern {

__device__ __forceinline__ float exponential(float x) {
    return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
    return exp(x);
}
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    return tanhf(x);
}
__device__ __forceinline__ double hyperbolic_tangent(double x) {
    return tanh(x);
}

// 1 / (1 + e^-x): 0 and 1 at the ends, since e^-x may be inf.
template <class Real>
__device__ __forceinline__ Real sigmoid(Real x) {
    return Real(1) / (Real(1) + exponential(-x));
}

// What a step of one unit met, for its backward.
template <class Real>
struct Met {
    Real h, h_prev, c, c_prev;
};

//     i = sigmoid(gx_i + gh_i)    f, o likewise    g = tanh(gx_g + gh_g)
//     c = f c_prev + i g          h = o tanh(c)
// With dc the gradient of c that comes from the step after:
//     dc += dh o (1 - tanh(c)^2)
//     d(pre-activation) = dc g i (1 - i), dc c_prev f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o)       of i, f, g, o
//     dc_prev = dc f
template <class Real>
struct Lstm {
    static constexpr int kGates = 4, kSaved = 4;
    static constexpr bool kHasC = true, kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, Real, Real& c, Real* saved) {
        const Real i = sigmoid(gx[0] + gh[0]);
        const Real f = sigmoid(gx[1] + gh[1]);
        const Real g = hyperbolic_tangent(gx[2] + gh[2]);
        const Real o = sigmoid(gx[3] + gh[3]);
        c = f * c + i * g;
        saved[0] = i;
        saved[1] = f;
        saved[2] = g;
        saved[3] = o;
        return o * hyperbolic_tangent(c);
    }

    static __device__ __forceinline__ Real output(const Real* saved, Real c) {
        return saved[3] * hyperbolic_tangent(c);
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Met<Real>& met, Real dh, Real& dc,
                                                    Real& direct, Real* dgx, Real*) {
        const Real i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const Real tanh_c = hyperbolic_tangent(met.c);
        dc += dh * o * (1 - tanh_c * tanh_c);
        dgx[0] = dc * g * i * (1 - i);
        dgx[1] = dc * met.c_prev * f * (1 - f);
        dgx[2] = dc * i * (1 - g * g);
        dgx[3] = dh * tanh_c * o * (1 - o);
        dc *= f;
        direct = 0;
    }
};

//     r = sigmoid(gx_r + gh_r)    z = sigmoid(gx_z + gh_z)    n = tanh(gx_n + r gh_n)
//     h = (1 - z) n + z h_prev
// backward:
//     dn = dh (1 - z) (1 - n^2)   of gx_n; of gh_n it is r dn
//     dr = dn gh_n r (1 - r)      dz = dh (h_prev - n) z (1 - z)
//     directly to h_prev: dh z
template <class Real>
struct Gru {
    static constexpr int kGates = 3, kSaved = 4;  // r, z, n, gh_n
    static constexpr bool kHasC = false, kSeparate = true;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, Real h_prev, Real&, Real* saved) {
        const Real r = sigmoid(gx[0] + gh[0]);
        const Real z = sigmoid(gx[1] + gh[1]);
        const Real n = hyperbolic_tangent(gx[2] + r * gh[2]);
        saved[0] = r;
        saved[1] = z;
        saved[2] = n;
        saved[3] = gh[2];
        return (1 - z) * n + z * h_prev;
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Met<Real>& met, Real dh, Real&,
                                                    Real& direct, Real* dgx, Real* dgh) {
        const Real r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
        const Real dn = dh * (1 - z) * (1 - n * n);
        dgx[0] = dgh[0] = dn * gh_n * r * (1 - r);
        dgx[1] = dgh[1] = dh * (met.h_prev - n) * z * (1 - z);
        dgx[2] = dn;
        dgh[2] = dn * r;
        direct = dh * z;
    }
};

//     h = tanh(gx + gh)           d(pre-activation) = dh (1 - h^2)
template <class Real>
struct RnnTanh {
    static constexpr int kGates = 1, kSaved = 0;
    static constexpr bool kHasC = false, kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, Real, Real&, Real*) {
        return hyperbolic_tangent(gx[0] + gh[0]);
    }

    static __device__ __forceinline__ void backward(const Real*, const Met<Real>& met, Real dh, Real&, Real& direct,
                                                    Real* dgx, Real*) {
        dgx[0] = dh * (1 - met.h * met.h);
        direct = 0;
    }
};

//     h = max(gx + gh, 0)         d(pre-activation) = dh where h > 0
// NaN passes both ways, as in torch.
template <class Real>
struct RnnRelu {
    static constexpr int kGates = 1, kSaved = 0;
    static constexpr bool kHasC = false, kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, Real, Real&, Real*) {
        const Real sum = gx[0] + gh[0];
        return sum < 0 ? Real(0) : sum;
    }

    static __device__ __forceinline__ void backward(const Real*, const Met<Real>& met, Real dh, Real&, Real& direct,
                                                    Real* dgx, Real*) {
        dgx[0] = met.h <= 0 ? Real(0) : dh;
        direct = 0;
    }
};

// The table of cells: calls run(policy) for the name in rnnkern/cells.py; false for no cell.
template <class Real, class Run>
bool with_cell(const char* name, Run run) {
    const auto is = [name](const char* cell) { return std::strcmp(name, cell) == 0; };
    if (is("lstm")) {
        run(Lstm<Real>());
    } else if (is("gru")) {
        run(Gru<Real>());
    } else if (is("rnn_tanh")) {
        run(RnnTanh<Real>());
    } else if (is("rnn_relu")) {
        run(RnnRelu<Real>());
    } else {
        return false;
    }
    return true;
}

}  // namespace rnnkern
