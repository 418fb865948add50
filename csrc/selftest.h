// Small kernels that each use one primitive of prims.cuh, or one part of CUDA that the sweeps stand on, in a way that
// shows what it does: on a GPU and on the host they have to give the same.
#pragma once

#include <cuda_runtime.h>

namespace rnnkern {

// Runs the kernel called `name`. `in` and `out` are on the device and hold arrays, row after row, one behind the other:
//
//     name                        in                             out
//     indices                     nothing                        uint32 (3, 2, 2, 2, 4, 8): for every block z y x and
//                                                                thread z y x its number, found from all sizes
//     barrier                     float (256,)                   float (256,): reversed through shared memory
//     large_shared                float (256,)                   float (256,): likewise, behind 64 KB that are not used
//     syncwarp                    float (32,)                    float (32,): likewise, by one warp
//     shuffle_{float,double,int}  float, double, int (32,)       the same type (2, 32): by xor 5; from 3 lanes further
//     bfloat16, float16           float (256,)                   float (256,): rounded to that type
//     to_tf32                     float (256,)                   uint32 (256,): rounded, as a float's bits
//     copy_async                  float (32, 4)                  float (32, 4): odd rows copied with no bytes, so zeros
//     copy_async_groups           float (8, 128)                 float (8, 128): rows reversed, by two groups in turns
//     load_matrix_x4, _x2         uint16 (32, 8), (16, 8)        uint32 (32, 4), (32, 2): the words of each lane
//     mma_bf16, mma_f16           float a (16, 16), b (16, 8), d (16, 8)         float (16, 8): d + a b, of a and b
//     mma_tf32                    float a (16, 8), b (8, 8), d (16, 8)           rounded to that type
//
// cudaErrorInvalidValue: there is no such name.
cudaError_t selftest(const char* name, const void* in, void* out, cudaStream_t stream);

}  // namespace rnnkern
