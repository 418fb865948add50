// The forward sweep of the general tier: any size, one launch a step (one more with a projection, and one with
// LayerNorm), no state on the chip between launches.
//
// In step t a block takes a tile of sequences and units, forms  gh = u W_hh^T  for all gates of these units
// (product.cuh), and goes on to the cell, each thread with its own sums:
//     h, c = cell(gx + b_ih, gh + b_hh, h', c')
// h' is read from y, where the step before has written it, or h0; c is in a buffer of its own, a number for each unit,
// and changed in place; gates go where gx was. So nothing is read and written by two blocks of one launch. u is h', or
// with resets or a recurrent mask a buffer of its own, of which a launch reads one half and writes the other
// (forward_unit.cuh). With a projection h goes to `unprojected`, and the second launch writes
//     y = h W_hr^T.
// With LayerNorm the first launch leaves gh, and another one goes on to the cell, a row a block (layer_norm.cuh).
#include "layer_norm.cuh"

namespace rnnkern {
namespace {

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
            return place.has(now, position) ? u_row<Precision>(place, sweep, step, position) : nullptr;
        },
        [&](int gate, int unit) {
            const int64_t u = place.first_unit + unit;
            return u < hidden ? weight + (gate * hidden + u) * outputs : nullptr;
        });
    OwnProduct::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u >= hidden || !place.has(now, position)) return;
        if (sweep.gh.data != nullptr) {
            Real* to = place.row<Real>(sweep.gh, now, place.sequence(position)) + u;
#pragma unroll
            for (int gate = 0; gate < Policy::kGates; ++gate) to[gate * hidden] = sums[gate];
            return;
        }
        Real saved[kKept<Policy>];
        const Real v = unit_forward<Precision, Policy>(place, sweep, step, position, u, sums, saved);
        hand_on<Precision>(place, sweep, step, position, u, Policy::output(saved, v));
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
    const Moment& now = step.now[place.direction];
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
    Product<OwnTile, 1>::each(tile, shared, [&](int row, int unit, const Real* sums) {
        const int64_t position = place.first_position + row, u = place.first_unit + unit;
        if (u < outputs && place.has(now, position)) finish<Precision>(place, sweep, step, position, u, sums[0]);
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
    bool aligned = aligned_operand(sweep, kSize), aligned_projection = true;
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
        if (sweep.gh.data != nullptr)
            launch("forward_norms", forward_norms<Precision, Policy>, kNormBytes, sizes, positions, 1, 1, 1, sweep,
                   step);
        if (sweep.unprojected == nullptr) continue;
        launch("forward_projection", forward_projection<Precision, kLarge>, kProjectionBytes, sizes, positions,
               ProjectionTile::kRows, sizes.outputs, ProjectionTile::kUnits, sweep, step, aligned_projection);
    }
    return launch.failure();
}

}  // namespace

template <class Precision>
Failure forward(const ForwardSweep& sweep, const char* cell, Tile tile, void* stream) {
    if (std::strcmp(cell, kResetBefore) == 0) return forward_reset_before<Precision>(sweep, tile, stream);
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
