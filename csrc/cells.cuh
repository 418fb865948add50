// The cells, a policy struct each: what one unit does in one step, forward and backward, under the equations it
// implements. Every tier uses them as they are.
//
// gx and gh are the pre-activations W_ih x + b_ih and W_hh u + b_hh of the unit, one number a gate; `saved` is what the
// step keeps for backward: kSaved numbers, or where there are none, its h. A step is in two parts, between which
// LayerNorm of c may come:
//     v = forward(gx, gh, around, c, saved)        h = output(saved, v)            v is h itself but for LSTM
// and so is backward, which gets dh, the gradient of h, and gives those of gx and gh, and in `direct` what of dh
// reaches the h before without going through W_hh:
//     dv = output_backward(saved, v, dh, dgx)      backward(saved, around, dv, dc, direct, dgx, dgh)
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

// Zoneout of one number: the old value where a mask says so, or a share of it in each new one.
template <class Real>
struct Zone {
    bool keeps = false;
    Real share = 0;

    __device__ __forceinline__ Real mix(Real old, Real fresh) const {
        if (keeps) return old;
        return share == 0 ? fresh : share * old + (1 - share) * fresh;
    }

    // What of the gradient of `mix` goes to `old`, and what to `fresh`.
    __device__ __forceinline__ Real of_old(Real gradient) const {
        if (keeps) return gradient;
        return share == 0 ? Real(0) : share * gradient;
    }
    __device__ __forceinline__ Real of_fresh(Real gradient) const { return keeps ? Real(0) : (1 - share) * gradient; }
};

// What c adds to the pre-activations of i, f and o of one unit.
template <class Real>
struct Peepholes {
    bool there = false;
    Real weights[3] = {};

    // Of gate 0, 1 or 2, or the gradient likewise; 0 whatever c is where there are none.
    __device__ __forceinline__ Real of(int gate, Real c) const { return there ? weights[gate] * c : Real(0); }
};

// What one unit meets in a step beside its pre-activations.
template <class Real>
struct Around {
    Real h_prev = 0, c_prev = 0;  // the states before, after any reset
    Zone<Real> zone_c;
    Peepholes<Real> peepholes;
};

//     i = sigmoid(gx_i + gh_i + p_i c_prev)    f likewise    g = tanh(gx_g + gh_g)
//     v = f c_prev + i g                       c = zone(c_prev, v)
//     o = sigmoid(gx_o + gh_o + p_o c)         h = o tanh(v)
// p are the peepholes, 0 where there are none, and zone is the new value where there is no zoneout. With dc the
// gradient of c that comes from the step after:
//     do = dh tanh(v) o (1 - o)                dc += p_o do
//     dv = dh o (1 - tanh(v)^2) + what of dc zoneout gives to v
//     d(pre-activation) = dv g i (1 - i), dv c_prev f (1 - f), dv i (1 - g^2), do               of i, f, g, o
//     dc_prev = dv f + what of dc zoneout gives to c_prev + p_i di + p_f df
template <class Real>
struct Lstm {
    static constexpr int kGates = 4, kSaved = 4;
    static constexpr bool kHasC = true, kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, const Around<Real>& around, Real& c,
                                                   Real* saved) {
        const Peepholes<Real>& peepholes = around.peepholes;
        const Real i = sigmoid(gx[0] + gh[0] + peepholes.of(0, around.c_prev));
        const Real f = sigmoid(gx[1] + gh[1] + peepholes.of(1, around.c_prev));
        const Real g = hyperbolic_tangent(gx[2] + gh[2]);
        const Real v = f * around.c_prev + i * g;
        c = around.zone_c.mix(around.c_prev, v);
        saved[0] = i;
        saved[1] = f;
        saved[2] = g;
        saved[3] = sigmoid(gx[3] + gh[3] + peepholes.of(2, c));
        return v;
    }

    static __device__ __forceinline__ Real output(const Real* saved, Real v) {
        return saved[3] * hyperbolic_tangent(v);
    }

    // v of a step, from what it saved.
    static __device__ __forceinline__ Real inner(const Real* saved, const Around<Real>& around) {
        return saved[1] * around.c_prev + saved[0] * saved[2];
    }

    static __device__ __forceinline__ Real output_backward(const Real* saved, Real v, Real dh, Real* dgx) {
        const Real o = saved[3], tanh_v = hyperbolic_tangent(v);
        dgx[3] = dh * tanh_v * o * (1 - o);
        return dh * o * (1 - tanh_v * tanh_v);
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Around<Real>& around, Real dv, Real& dc,
                                                    Real& direct, Real* dgx, Real*) {
        const Real i = saved[0], f = saved[1], g = saved[2];
        const Peepholes<Real>& peepholes = around.peepholes;
        dc += peepholes.of(2, dgx[3]);
        dv += around.zone_c.of_fresh(dc);
        dgx[0] = dv * g * i * (1 - i);
        dgx[1] = dv * around.c_prev * f * (1 - f);
        dgx[2] = dv * i * (1 - g * g);
        dc = dv * f + around.zone_c.of_old(dc) + peepholes.of(0, dgx[0]) + peepholes.of(1, dgx[1]);
        direct = 0;
    }
};

// Cells whose output is what `forward` gives.
template <class Real>
struct WithoutC {
    static constexpr bool kHasC = false;

    static __device__ __forceinline__ Real output(const Real*, Real v) { return v; }
    static __device__ __forceinline__ Real inner(const Real*, const Around<Real>&) { return 0; }
    static __device__ __forceinline__ Real output_backward(const Real*, Real, Real dh, Real*) { return dh; }
};

//     r = sigmoid(gx_r + gh_r)    z = sigmoid(gx_z + gh_z)    n = tanh(gx_n + r gh_n)
//     h = (1 - z) n + z h_prev
// backward:
//     dn = dh (1 - z) (1 - n^2)   of gx_n; of gh_n it is r dn
//     dr = dn gh_n r (1 - r)      dz = dh (h_prev - n) z (1 - z)
//     directly to h_prev: dh z
template <class Real>
struct Gru : WithoutC<Real> {
    static constexpr int kGates = 3, kSaved = 4;  // r, z, n, gh_n
    static constexpr bool kSeparate = true;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, const Around<Real>& around, Real&,
                                                   Real* saved) {
        const Real r = sigmoid(gx[0] + gh[0]);
        const Real z = sigmoid(gx[1] + gh[1]);
        const Real n = hyperbolic_tangent(gx[2] + r * gh[2]);
        saved[0] = r;
        saved[1] = z;
        saved[2] = n;
        saved[3] = gh[2];
        return (1 - z) * n + z * around.h_prev;
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Around<Real>& around, Real dh, Real&,
                                                    Real& direct, Real* dgx, Real* dgh) {
        const Real r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
        const Real dn = dh * (1 - z) * (1 - n * n);
        dgx[0] = dgh[0] = dn * gh_n * r * (1 - r);
        dgx[1] = dgh[1] = dh * (around.h_prev - n) * z * (1 - z);
        dgx[2] = dn;
        dgh[2] = dn * r;
        direct = dh * z;
    }
};

// The GRU whose last gate's product is W_hn (r u), so that a step has two products, one after the other, and each part
// its own functions (reset_before.cu).
//     r = sigmoid(gx_r + gh_r)    z = sigmoid(gx_z + gh_z)    n = tanh(gx_n + W_hn (r u) + b_hn)
//     h = (1 - z) n + z h_prev
// backward, with q = dn W_hn the gradient of r u:
//     dn = dh (1 - z) (1 - n^2)   dz = dh (h_prev - n) z (1 - z)   directly to h_prev: dh z
//     dr = q u r (1 - r)          to u beside its own product: q r
template <class Real>
struct GruResetBefore {
    static constexpr int kGates = 3;  // and saved blocks: r, z, n

    static __device__ __forceinline__ Real gate(Real sum) { return sigmoid(sum); }  // r, z

    static __device__ __forceinline__ Real candidate(Real sum) { return hyperbolic_tangent(sum); }

    static __device__ __forceinline__ Real output(Real z, Real n, Real h_prev) { return (1 - z) * n + z * h_prev; }

    static __device__ __forceinline__ void output_backward(Real z, Real n, Real h_prev, Real dh, Real& dz, Real& dn,
                                                           Real& direct) {
        dn = dh * (1 - z) * (1 - n * n);
        dz = dh * (h_prev - n) * z * (1 - z);
        direct = dh * z;
    }

    static __device__ __forceinline__ void reset_backward(Real r, Real u, Real q, Real& dr, Real& du) {
        dr = q * u * r * (1 - r);
        du = q * r;
    }
};

//     h = tanh(gx + gh)           d(pre-activation) = dh (1 - h^2)
template <class Real>
struct RnnTanh : WithoutC<Real> {
    static constexpr int kGates = 1, kSaved = 0;
    static constexpr bool kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, const Around<Real>&, Real&,
                                                   Real* saved) {
        return saved[0] = hyperbolic_tangent(gx[0] + gh[0]);
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Around<Real>&, Real dh, Real&,
                                                    Real& direct, Real* dgx, Real*) {
        dgx[0] = dh * (1 - saved[0] * saved[0]);
        direct = 0;
    }
};

//     h = max(gx + gh, 0)         d(pre-activation) = dh where h > 0
// NaN passes both ways, as in torch.
template <class Real>
struct RnnRelu : WithoutC<Real> {
    static constexpr int kGates = 1, kSaved = 0;
    static constexpr bool kSeparate = false;

    static __device__ __forceinline__ Real forward(const Real* gx, const Real* gh, const Around<Real>&, Real&,
                                                   Real* saved) {
        const Real sum = gx[0] + gh[0];
        return saved[0] = sum < 0 ? Real(0) : sum;
    }

    static __device__ __forceinline__ void backward(const Real* saved, const Around<Real>&, Real dh, Real&,
                                                    Real& direct, Real* dgx, Real*) {
        dgx[0] = saved[0] <= 0 ? Real(0) : dh;
        direct = 0;
    }
};

// How many numbers `saved` has.
template <class Policy>
constexpr int kKept = Policy::kSaved > 0 ? Policy::kSaved : 1;

// The table of cells with one product a step: calls run(policy) for the name in rnnkern/cells.py; false for no such
// cell.
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
