// What a sweep is given: plain data, so that Python can fill it in without torch's headers and a kernel can take it by
// value.
//
// T steps, B sequences, H hidden units, P outputs a direction (H, or the size of the projection), D directions, G
// gates, S saved blocks of H. "element" is the dtype of the layer (float, double, __nv_bfloat16, __half); "real" is the
// one computed in, double for double and float for all others. Every buffer is allocated by the caller, lives on the
// device of the launch unless said otherwise, and aliases no other unless said otherwise.
#pragma once
#include <cstdint>

namespace rnnkern {

constexpr int kMostDirections = 2;

// A buffer with one row for each step and sequence. The row of sequence b at step t starts at
//     data + t * step + b * sequence + direction * d           padded
//     data + (starts[t] + b) * step + direction * d            packed; step and sequence are the same
// counted in the buffer's numbers. A row's own numbers are adjacent.
struct Rows {
    void* data;  // null: not there
    int64_t step, sequence, direction;
};

// Which sequences have which step. Three kinds:
//     all have all             lengths and counts are null
//     padded, of own lengths   lengths and order are given
//     packed, longest first    counts is given: counts[t] sequences have step t, and they are the first ones
struct Sequences {
    const int64_t* lengths;  // (B,) 1 <= length <= T
    const int64_t* order;    // (B,) the sequences, longest first: short ones end together
    const int64_t* counts;   // (T,) falling, in host memory
};

struct Sizes {
    int64_t steps, batch, hidden, outputs, directions;
};

// What a sweep does beyond the plain cell. Null, and shares of 0, where nobody asks.
//
// u is h where it meets W_hh: after a reset, and times the recurrent mask. v is what the output's tanh takes in an
// LSTM.
struct Extras {
    const void* recurrent_mask;   // element, (D, B, P): factors of h where it meets W_hh
    Rows zone_mask_h;             // bool, (T, B, D*P): where h keeps its old value
    Rows zone_mask_c;             // bool, (T, B, D*H): where c does
    double zoneout_h, zoneout_c;  // where there is no mask: the share of the old value in the new one
    const bool* reset;  // (T, B), of one direction and rows that are not packed: where the states before are replaced
    Rows reset_h;       // element, (T, B, P), or (B, P) with no distance between steps: by these, or null for zeros
    Rows reset_c;       // real, (T, B, H) or (B, H), likewise
    const void* weight_ch[kMostDirections];     // element, (3*H,): the peepholes of i, f and o
    const void* ln_hh_weight[kMostDirections];  // element, (G*H,): LayerNorm of u W_hh^T
    const void* ln_hh_bias[kMostDirections];    // element, (G*H,)
    const void* ln_c_weight[kMostDirections];   // element, (H,): of v, where the cell has a c
    const void* ln_c_bias[kMostDirections];     // element, (H,)
};

struct ForwardSweep {
    Sizes sizes;
    Sequences sequences;
    Extras extras;
    Rows gx;  // real, (T, B, D, G*H) in the first columns of each row: x W_ih^T, no bias; normalised, where it shall be
    Rows gates;  // real, (T, B, D, S*H) or null: activated gates for backward. May be gx itself. Never null where two
                 // launches of a step share them: LayerNorm of v, and gru_reset_before. Rows past a length are left
                 // alone
    Rows cells;  // real, (T, B, D, H) or null: c of every step. Not written past a length
    Rows y;      // element, (T, B, D*P): the output, and what the next step reads as h. Not written past a length
    Rows gh;  // real, (T, B, D, G*H) or null: u W_hh^T as LayerNorm takes it. Null: there is none. This and gates may
              // have no distance between steps, (D, B, n), where only a step's own launches read them
    const void* weight_hh[kMostDirections];  // element, (G*H, P)
    const void* weight_hr[kMostDirections];  // element, (P, H) or null
    const void* bias_ih[kMostDirections];    // element, (G*H,) or null
    const void* bias_hh[kMostDirections];    // element, (G*H,) or null
    const void* h0;                          // element, (D, B, P)
    void* h_n;                               // element, (D, B, P)
    void* c;                                 // real, (D, B, H) or null: c0 before, c_n after
    void* unprojected;                       // element, (D, B, H) or null: a step's h before the projection
    void* u;  // element, (2, D, B, P) or null, then u is h: the u of even launches and of odd ones. Both hold that
              // of a sequence's first step before
    void* reset_u;  // element, (D, B, H): r u of gru_reset_before; null for other cells
    void* inner;    // real, (D, B, H): v, where it is normalised; else null
};

// Launches begin to end - 1 of the backward sweep, of T in all, the first of which is the last step of one direction
// and the first of the other. Rows whose name begins with d (but dy and dcells), gates, gh, h_prev and unprojected are
// only touched at steps of that range; the other rows are there for all steps.
struct BackwardSweep {
    Sizes sizes;
    Sequences sequences;
    Extras extras;
    int64_t begin, end;
    Rows gates, cells, y, gh;  // as forward left them
    Rows dy;                   // element, (T, B, D*P) or null
    Rows dcells;               // real, (T, B, D, H) or null: gradients of all c
    // element, with LayerNorm real, (T, B, D, G*H): gradient of x W_ih^T + b_ih, normalised where it was. This and
    // those below are not written past a length
    Rows dgx;
    Rows dgh;           // likewise: of u W_hh^T + b_hh. dgx itself where the cell's are the same
    Rows dproduct;      // element, (T, B, D, G*H): of u W_hh^T. dgh itself without LayerNorm
    Rows dinner;        // real, (T, B, D, H): of v normalised, or null
    Rows h_prev;        // element, (T, B, D, P): u of the step
    Rows dh_projected;  // element, (T, B, D, P) or null: gradient of the projected h
    Rows unprojected;   // element, (T, B, D, H) or null: h before the projection
    Rows dreset_h;      // real, (T, B, P), or (B, P) with no distance between steps, or null. Added to
    Rows dreset_c;      // real, (T, B, H) or (B, H) or null, likewise
    const void* weight_hh_t[kMostDirections];  // element, (P, G*H): W_hh transposed
    const void* weight_hr_t[kMostDirections];  // element, (H, P) or null: W_hr transposed
    const void* h0;                            // element, (D, B, P)
    const void* c0;                            // real, (D, B, H) or null
    void* dh;  // real, (D, B, P): dh_n before the sweep, dh0 after it; between ranges, what the next one goes on from
    void* dc;  // real, (D, B, H) or null: likewise
    void* direct;  // real, (D, B, P) or null, which is zero: dh that reaches the step before past W_hh. Need not be set
    void* arrived;  // real, (D, B, H): dh of the cell, where its row has to be complete for LayerNorm; else null
    void* inner;    // real, (D, B, H): v, where it is normalised; else null
};

// How a block of threads shares a step: few rows, so that a small batch still occupies many blocks, or many.
enum class Tile { automatic, small, large };

// Why a sweep stopped. `error` is a cudaError_t, 0 for none.
struct Failure {
    int error;
    const char* kernel;
    int64_t launch;  // how many launches had gone well
};

// The precisions, by the names that build.py compiles the sweeps for.
namespace precision {
struct float32;
struct float64;
struct tf32;
struct bfloat16;
struct float16;
}  // namespace precision

// Queues a layer's sweep, one launch a step and one more for each of a projection and LayerNorm, on `stream`, a
// cudaStream_t. `cell` is a name of rnnkern/cells.py.
template <class Precision>
Failure forward(const ForwardSweep& sweep, const char* cell, Tile tile, void* stream);
template <class Precision>
Failure backward(const BackwardSweep& sweep, const char* cell, Tile tile, void* stream);

// The same for the cell whose reset gate comes before the product.
constexpr const char* kResetBefore = "gru_reset_before";
template <class Precision>
Failure forward_reset_before(const ForwardSweep& sweep, Tile tile, void* stream);
template <class Precision>
Failure backward_reset_before(const BackwardSweep& sweep, Tile tile, void* stream);

}  // namespace rnnkern
