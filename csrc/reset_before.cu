// Both sweeps of the GRU whose reset gate comes before the product (cells.cuh has its equations): two launches a step,
// since W_hn meets r u, which needs r of all units. Around them all is as in forward.cu and backward.cu, and so are the
// layouts; the tiles go over one gate's sums, and units of the first launch forward are those of r and z, 2*H.
//
// Forward:    r, z = gates(gx + b, u W_h(r,z)^T)            left in gates; r u in `reset_u`
//             n = candidate(gx_n + b, (r u) W_hn^T)         h = output(z, n, h')
// Backward:   dh = mask * (dgx[s]_(r,z) W_h(r,z) ) + direct[s] + dy[t]  and so on as in backward.cu
//             dz, dn to dgx[t]                              direct[t] = what goes straight
//             q = dn W_hn                                   dr to dgx[t], and mask * q r on top of direct[t]
// Numbers of dgx that the second launch writes, dr, are none that it reads, dn. A number of direct belongs to one
// thread in a launch. dW_hh is torch's again: its last rows with r u, the others with u.
#include "backward_unit.cuh"
#include "forward_unit.cuh"

namespace rnnkern {
namespace {

template <class Precision>
using Cell = GruResetBefore<typename Precision::Real>;

constexpr int kFirstGates = 2;  // r and z

// A row of gates as it is after the first launch, in the place of gx.
template <class Precision>
__device__ __forceinline__ typename Precision::Real* gates_row(const Place& place, const ForwardSweep& sweep,
                                                               const Step& step, int64_t position) {
    return place.row<typename Precision::Real>(sweep.gates, step.now[place.direction], place.sequence(position));
}

// gx of number `at` of a row, with both biases and the sum of the product.
template <class Precision>
__device__ __forceinline__ typename Precision::Real pre_activation(const Place& place, const ForwardSweep& sweep,
                                                                   const Step& step, int64_t position, int64_t at,
                                                                   typename Precision::Real sum) {
    using Real = typename Precision::Real;
    const int d = place.direction;
    const Real x = place.row<const Real>(sweep.gx, step.now[d], place.sequence(position))[at];
    return biased<Precision>(sweep.bias_ih[d], at, x) + biased<Precision>(sweep.bias_hh[d], at, sum);
}

template <class Precision, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    forward_gates(const __grid_constant__ ForwardSweep sweep, const __grid_constant__ Step step, const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment& now = step.now[place.direction];
    if (!place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, width = kFirstGates * hidden;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh[place.direction]);
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, hidden, aligned, weight,
        [&](int row) {
            const int64_t position = place.first_position + row;
            return place.has(now, position) ? u_row<Precision>(place, sweep, step, position) : nullptr;
        },
        [&](int, int unit) {
            const int64_t at = place.first_unit + unit;
            return at < width ? weight + at * hidden : nullptr;
        });
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, at = place.first_unit + unit;
        if (at >= width || !place.has(now, position)) return;
        const Real gate = Cell<Precision>::gate(pre_activation<Precision>(place, sweep, step, position, at, sums[0]));
        gates_row<Precision>(place, sweep, step, position)[at] = gate;
        if (at < hidden) {
            const Real u = to_real(u_row<Precision>(place, sweep, step, position)[at]);
            Element* reset_u = static_cast<Element*>(sweep.reset_u);
            store(place.state(reset_u, place.sequence(position), hidden) + at, gate * u);
        }
    });
}

template <class Precision, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    forward_candidate(const __grid_constant__ ForwardSweep sweep, const __grid_constant__ Step step,
                      const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const int d = place.direction;
    const Moment& now = step.now[d];
    if (!place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, first = kFirstGates * hidden;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh[d]) + first * hidden;
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, hidden, aligned, weight,
        [&](int row) -> const Element* {
            const int64_t position = place.first_position + row;
            if (!place.has(now, position)) return nullptr;
            return place.state(static_cast<const Element*>(sweep.reset_u), place.sequence(position), hidden);
        },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + u * hidden : nullptr;
        });
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u >= hidden || !place.has(now, position)) return;
        Real* gates = gates_row<Precision>(place, sweep, step, position);
        const Real n =
            Cell<Precision>::candidate(pre_activation<Precision>(place, sweep, step, position, first + u, sums[0]));
        gates[first + u] = n;
        const Real h_old = h_prime<Precision>(place, sweep, now, step.before[d], position, u);
        finish<Precision>(place, sweep, step, position, u, Cell<Precision>::output(gates[hidden + u], n, h_old));
    });
}

template <class Precision, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    backward_candidate(const __grid_constant__ BackwardSweep sweep, const __grid_constant__ Step step,
                       const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment &before = step.before[place.direction], &now = step.now[place.direction];
    if (!place.has(before, place.first_position) && !place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, depth = kFirstGates * hidden;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh_t[place.direction]);
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, step.first ? 0 : depth, aligned, weight,
        [&](int row) { return dproduct_before<Precision>(place, sweep, step, place.first_position + row); },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + u * Cell<Precision>::kGates * hidden : nullptr;
        });
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        Arrived<Real> arrived;
        if (u >= hidden || !(place.has(now, position) || place.has(before, position)) ||
            !arrive<Precision>(place, sweep, step, position, u, sums[0], arrived))
            return;
        const int64_t sequence = place.sequence(position);
        const Real* gates = place.row<const Real>(sweep.gates, now, sequence) + u;
        Real dz, dn, direct;
        Cell<Precision>::output_backward(gates[hidden], gates[2 * hidden], arrived.h_prime, arrived.dh, dz, dn, direct);
        Element* dgx = place.row<Element>(sweep.dgx, now, sequence) + u;
        store(dgx + hidden, dz);
        store(dgx + 2 * hidden, dn);
        place.state(static_cast<Real*>(sweep.direct), sequence, hidden)[u] = arrived.straight + direct;
    });
}

template <class Precision, bool kLarge>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    backward_reset(const __grid_constant__ BackwardSweep sweep, const __grid_constant__ Step step, const bool aligned) {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    RNNKERN_DYNAMIC_SHARED(shared);
    const Place place(sweep.sizes, sweep.sequences, OwnTile::kRows, OwnTile::kUnits);
    const Moment& now = step.now[place.direction];
    if (!place.has(now, place.first_position)) return;
    const int64_t hidden = sweep.sizes.hidden, first = kFirstGates * hidden;
    const Element* weight = static_cast<const Element*>(sweep.weight_hh_t[place.direction]) + first;
    OwnTile tile;
    Product<OwnTile, 1>::run(
        tile, shared, hidden, aligned, weight,
        [&](int row) -> const Element* {
            const int64_t position = place.first_position + row;
            if (!place.has(now, position)) return nullptr;
            return place.row<const Element>(sweep.dgx, now, place.sequence(position)) + first;
        },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + u * Cell<Precision>::kGates * hidden : nullptr;
        });
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u >= hidden || !place.has(now, position)) return;
        const int64_t sequence = place.sequence(position);
        const Real r = place.row<const Real>(sweep.gates, now, sequence)[u];
        Real dr, du;
        Cell<Precision>::reset_backward(r, to_real(place.row<const Element>(sweep.h_prev, now, sequence)[u]), sums[0],
                                        dr, du);
        store(place.row<Element>(sweep.dgx, now, sequence) + u, dr);
        place.state(static_cast<Real*>(sweep.direct), sequence, hidden)[u] +=
            masked<Precision>(place, sweep.extras, sequence, u, du);
    });
}

template <class Precision, bool kLarge>
Failure sweep_forward(const ForwardSweep& sweep, void* stream) {
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    constexpr int kBytes = Product<OwnTile, 1>::kSharedBytes;
    constexpr int64_t kSize = sizeof(typename Precision::Element);
    const Sizes& sizes = sweep.sizes;
    const int64_t hidden = sizes.hidden;
    bool aligned = aligned_operand(sweep, kSize), aligned_reset = aligned_rows(sweep.reset_u, kSize, hidden, {});
    for (int d = 0; d < sizes.directions; ++d) {
        aligned = aligned && aligned_pointer(sweep.weight_hh[d]);
        aligned_reset = aligned_reset && aligned_pointer(sweep.weight_hh[d]);
    }
    const Steps steps(sizes, sweep.sequences);
    Launcher launch(stream);
    const auto first = forward_gates<Precision, kLarge>, second = forward_candidate<Precision, kLarge>;
    launch.allow("forward_gates", first, kBytes);
    launch.allow("forward_candidate", second, kBytes);
    for (int64_t n = 0; n < sizes.steps; ++n) {
        const Step step = steps.at(n, false);
        const int64_t positions = steps.most(step);
        launch("forward_gates", first, kBytes, sizes, positions, OwnTile::kRows, kFirstGates * hidden, OwnTile::kUnits,
               sweep, step, aligned);
        launch("forward_candidate", second, kBytes, sizes, positions, OwnTile::kRows, hidden, OwnTile::kUnits, sweep,
               step, aligned_reset);
    }
    return launch.failure();
}

template <class Precision, bool kLarge>
Failure sweep_backward(const BackwardSweep& sweep, void* stream) {
    using OwnTile = typename TileOf<Precision, 1, kLarge>::Type;
    constexpr int kBytes = Product<OwnTile, 1>::kSharedBytes;
    const Sizes& sizes = sweep.sizes;
    const int64_t hidden = sizes.hidden;
    bool aligned = aligned_rows(sweep.dgx, sizeof(typename Precision::Element), hidden);
    for (int d = 0; d < sizes.directions; ++d) aligned = aligned && aligned_pointer(sweep.weight_hh_t[d]);
    const Steps steps(sizes, sweep.sequences);
    Launcher launch(stream);
    const auto first = backward_candidate<Precision, kLarge>, second = backward_reset<Precision, kLarge>;
    launch.allow("backward_candidate", first, kBytes);
    launch.allow("backward_reset", second, kBytes);
    for (int64_t n = sweep.begin; n <= sweep.end; ++n) {
        const Step step = steps.of_range(n, sweep.begin, sweep.end);
        const int64_t positions = steps.most(step);
        launch("backward_candidate", first, kBytes, sizes, positions, OwnTile::kRows, hidden, OwnTile::kUnits, sweep,
               step, aligned);
        if (n < sweep.end)
            launch("backward_reset", second, kBytes, sizes, positions, OwnTile::kRows, hidden, OwnTile::kUnits, sweep,
                   step, aligned);
    }
    return launch.failure();
}

template <class Precision>
bool large(Tile tile, const Sizes& sizes) {
    using Large = typename TileOf<Precision, 1, true>::Type;
    return takes_large(tile, sizes, Large::kRows, Large::kUnits);
}

}  // namespace

template <class Precision>
Failure forward_reset_before(const ForwardSweep& sweep, Tile tile, void* stream) {
    return large<Precision>(tile, sweep.sizes) ? sweep_forward<Precision, true>(sweep, stream)
                                               : sweep_forward<Precision, false>(sweep, stream);
}

template <class Precision>
Failure backward_reset_before(const BackwardSweep& sweep, Tile tile, void* stream) {
    return large<Precision>(tile, sweep.sizes) ? sweep_backward<Precision, true>(sweep, stream)
                                               : sweep_backward<Precision, false>(sweep, stream);
}

template Failure forward_reset_before<precision::RNNKERN_PRECISION>(const ForwardSweep&, Tile, void*);
template Failure backward_reset_before<precision::RNNKERN_PRECISION>(const BackwardSweep&, Tile, void*);

}  // namespace rnnkern
