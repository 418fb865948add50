// The backward sweep of the general tier: any size, one launch a step (one more with a projection, and one with
// LayerNorm), and one more at the end for dh0.
//
// Let s be the step that the forward sweep took after t. In the launch of step t a block takes a tile of sequences and
// units, and forms
//     dh' = mask * (dproduct[s] W_hh) + direct[s]     for sequences that have step s; if s is reset, of the reset state
//     dh = dh' (or 0) + dy[t]                         for these
//     dh = dh_n + dy[t]                               for those whose last step t is
// the product by product.cuh with W_hh transposed, the rest in the thread that has the sum. It goes on to the cell,
// past zoneout, which gives a part of dh straight to direct[t]:
//     dgx[t], dgh[t], dc, direct[t] = cell backward(gates[t], h', c', dh, dc)
// For sequences that have step s but not t, the first of the forward sweep was s, and dh is dh0. dc and direct are
// changed in place, a number for each unit; dproduct, which is dgh without LayerNorm, is written in rows of step t and
// read in rows of step s: no number is read and written by two blocks of one launch.
//
// With a projection h = W_hr m, the product above gives the gradient of the projected h, which the first launch keeps
// as dh_projected[t]; the second forms
//     dm = dh_projected[t] W_hr
// and goes on to the cell. With LayerNorm dh of the cell is kept in `arrived`, and the last launch goes on, a row a
// block (layer_norm.cuh). What is left to torch are sums over all rows: dW_ih = dgx^T x, dW_hh = dproduct^T u, dW_hr =
// dh_projected^T m, db = sums of dgx and dgh, and dx = dgx W_ih. For them the sweep gathers u, in rows called h_prev,
// and m, `unprojected`.
//
// A call may be for a range of launches: what is carried (dh, dc) goes from one to the next through memory, and no
// range reads rows of gradients that another one wrote.
#include "layer_norm.cuh"

namespace rnnkern {
namespace {

// What a step's cell does backward to one unit of one sequence.
template <class Precision, class Policy>
__device__ __forceinline__ void unit_backward(const Place& place, const BackwardSweep& sweep, const Step& step,
                                              int64_t position, int64_t unit,
                                              const Arrived<typename Precision::Real>& arrived) {
    BackwardUnit<Precision, Policy> at(place, sweep, step, position, unit, arrived.h_prime);
    at.template finish<typename Precision::Element>(at.through_output(Policy::inner(at.saved, at.around), arrived.dh),
                                                    arrived.straight);
}

// Keeps dh of the cell for the launch that goes on.
template <class Real>
__device__ __forceinline__ void keep_arrived(const Place& place, const BackwardSweep& sweep, int64_t position,
                                             int64_t unit, Real dh) {
    place.state(static_cast<Real*>(sweep.arrived), place.sequence(position), sweep.sizes.hidden)[unit] = dh;
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
        [&](int row) { return dproduct_before<Precision>(place, sweep, step, place.first_position + row); },
        [&](int, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < outputs ? weight + u * depth : nullptr;
        });
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        Arrived<Real> arrived;
        if (u >= outputs || !(place.has(now, position) || place.has(before, position)) ||
            !arrive<Precision>(place, sweep, step, position, u, sums[0], arrived))
            return;
        const bool projected = sweep.dh_projected.data != nullptr;
        if (!projected && sweep.arrived == nullptr) {
            unit_backward<Precision, Policy>(place, sweep, step, position, u, arrived);
            return;
        }
        const int64_t sequence = place.sequence(position);
        if (sweep.direct != nullptr)
            place.state(static_cast<Real*>(sweep.direct), sequence, outputs)[u] = arrived.straight;
        if (projected) {
            store(place.row<Element>(sweep.dh_projected, now, sequence) + u, arrived.dh);
        } else {
            keep_arrived(place, sweep, position, u, arrived.dh);
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
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u >= hidden || !place.has(now, position)) return;
        if (sweep.arrived != nullptr) {
            keep_arrived(place, sweep, position, u, sums[0]);
        } else {
            unit_backward<Precision, Policy>(place, sweep, step, position, u, {sums[0], 0, 0});
        }
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
    found.recurrent = aligned_rows(sweep.dproduct, kSize, depth);
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
    for (int64_t n = sweep.begin; n <= sweep.end; ++n) {
        const Step step = steps.of_range(n, sweep.begin, sweep.end);
        const int64_t positions = steps.most(step);
        launch("backward_step", first, kBytes, sizes, positions, Tile::kRows, sizes.outputs, Tile::kUnits, sweep, step,
               aligned.recurrent);
        if constexpr (Policy::kHasC) {  // no other cell has a projection
            const auto second = backward_projected_step<Precision, Policy, kLarge>;
            if (projected && n < sweep.end)
                launch("backward_projected_step", second, kBytes, sizes, positions, Tile::kRows, sizes.hidden,
                       Tile::kUnits, sweep, step, aligned.projection);
        }
        if (sweep.arrived != nullptr && n < sweep.end)
            launch("backward_norms", backward_norms<Precision, Policy>, kNormBytes, sizes, positions, 1, 1, 1, sweep,
                   step);
    }
    return launch.failure();
}

}  // namespace

template <class Precision>
Failure backward(const BackwardSweep& sweep, const char* cell, Tile tile, void* stream) {
    if (std::strcmp(cell, kResetBefore) == 0) return backward_reset_before<Precision>(sweep, tile, stream);
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
