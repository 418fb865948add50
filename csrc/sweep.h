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

struct ForwardSweep {
    Sizes sizes;
    Sequences sequences;
    Rows gx;     // real, (T, B, D, G*H) in the first columns of each row: x W_ih^T, no bias
    Rows gates;  // real, (T, B, D, S*H) or null: activated gates for backward. May be gx itself
    Rows cells;  // real, (T, B, D, H) or null: c of every step for backward
    Rows y;      // element, (T, B, D*P): the output, and what the next step reads as h
    const void* weight_hh[kMostDirections];  // element, (G*H, P)
    const void* weight_hr[kMostDirections];  // element, (P, H) or null
    const void* bias_ih[kMostDirections];    // element, (G*H,) or null
    const void* bias_hh[kMostDirections];    // element, (G*H,) or null
    const void* h0;                          // element, (D, B, P)
    void* h_n;                               // element, (D, B, P)
    void* c;                                 // real, (D, B, H) or null: c0 before, c_n after
    void* unprojected;                       // element, (D, B, H) or null: a step's h before the projection
};

struct BackwardSweep {
    Sizes sizes;
    Sequences sequences;
    Rows gates, cells, y;  // as forward left them
    Rows dy;               // element, (T, B, D*P) or null
    Rows dgx;              // element, (T, B, D, G*H): gradient of x W_ih^T + b_ih. Not written past a length
    Rows dgh;              // element, (T, B, D, G*H): of h W_hh^T + b_hh. dgx itself where the cell's are the same
    Rows h_prev;           // element, (T, B, D, P): the h that met W_hh. Not written past a length
    Rows dh_projected;     // element, (T, B, D, P) or null: gradient of the projected h
    Rows unprojected;      // element, (T, B, D, H) or null: h before the projection
    const void* weight_hh_t[kMostDirections];  // element, (P, G*H): W_hh transposed
    const void* weight_hr_t[kMostDirections];  // element, (H, P) or null: W_hr transposed
    const void* h0;                            // element, (D, B, P)
    const void* c0;                            // real, (D, B, H) or null
    const void* dh_n;                          // element, (D, B, P) or null
    void* dh0;                                 // element, (D, B, P)
    void* dc;                                  // real, (D, B, H) or null: dc_n before, dc0 after
    void* direct;  // real, (D, B, H): dh that reaches the step before past W_hh; need not be set before
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

// Queues a layer's sweep, one launch a step (two with a projection), on `stream`, a cudaStream_t. `cell` is a name that
// with_cell of cells.cuh knows.
template <class Precision>
Failure forward(const ForwardSweep& sweep, const char* cell, Tile tile, void* stream);
template <class Precision>
Failure backward(const BackwardSweep& sweep, const char* cell, Tile tile, void* stream);

}  // namespace rnnkern
