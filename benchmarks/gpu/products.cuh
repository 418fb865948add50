// What a block's share of a step's recurrent product takes: `rows` x `depth` weights, which stay in shared memory or
// come from the L2 cache, times `depth` x 8 of the batch.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "../../csrc/prims.cuh"

namespace probe {

constexpr int kColumns = 8;  // of the batch
constexpr int kPadding = 8;  // numbers behind a row, so that rows start in different banks
constexpr int kWarp = 32;

constexpr int tensor_core_bytes(int rows, int depth) {
    return (rows + kColumns) * (depth + kPadding) * int(sizeof(__nv_bfloat16));
}

constexpr int fma_bytes(int rows, int depth) {
    return depth * (rows + kColumns) * int(sizeof(float));
}

// bfloat16 by the tensor cores. Rows are a multiple of 16, as is the depth.
__global__ void product_by_tensor_cores(int iterations, int rows, int depth, float* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    __nv_bfloat16* weights = reinterpret_cast<__nv_bfloat16*>(memory);  // (rows, apart), then (kColumns, apart)
    const int apart = depth + kPadding;
    const __nv_bfloat16* h = weights + rows * apart;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    for (int i = threadIdx.x; i < (rows + kColumns) * apart; i += blockDim.x) {
        weights[i] = __float2bfloat16(0.001f * float(i % 7));
    }
    __syncthreads();
    float sums[4] = {};
    for (int t = 0; t < iterations; ++t) {
        for (int row = warp * 16; row < rows; row += blockDim.x / kWarp * 16) {
            for (int k = 0; k < depth; k += 16) {
                uint32_t a[4];
                uint32_t b[2];
                rnnkern::load_matrix_x4(a, weights + (row + lane % 16) * apart + k + lane / 16 * 8);
                rnnkern::load_matrix_x2(b, h + lane % 8 * apart + k + lane / 8 % 2 * 8);
                rnnkern::mma_bf16(sums, a, b);
            }
        }
        __syncthreads();
    }
    if (sums[0] == 12345.f) *out = sums[1] + sums[2] + sums[3];  // never: but the compiler does not know
}

// float32, a thread for each row.
__global__ void product_by_fma(int iterations, int rows, int depth, float* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* weights = reinterpret_cast<float*>(memory);  // (depth, rows), then (depth, kColumns)
    const float* h = weights + depth * rows;
    for (int i = threadIdx.x; i < depth * (rows + kColumns); i += blockDim.x) weights[i] = 0.001f * float(i % 5);
    __syncthreads();
    float kept = 0.f;
    for (int t = 0; t < iterations; ++t) {
        for (int row = threadIdx.x; row < rows; row += blockDim.x) {
            float sums[kColumns] = {};
#pragma unroll 8
            for (int k = 0; k < depth; ++k) {
                const float weight = weights[k * rows + row];
#pragma unroll
                for (int column = 0; column < kColumns; ++column) {
                    sums[column] = fmaf(weight, h[k * kColumns + column], sums[column]);
                }
            }
#pragma unroll
            for (int column = 0; column < kColumns; ++column) kept += sums[column];
        }
        __syncthreads();
    }
    if (kept == 12345.f) *out = kept;  // never: but the compiler does not know
}

// Reading `bytes` of weights that all blocks share from the L2 cache, by vectors, and nothing else.
__global__ void weights_from_l2(int iterations, int bytes, const float4* weights, float* out) {
    float kept = 0.f;
    for (int t = 0; t < iterations; ++t) {
#pragma unroll 8
        for (int i = threadIdx.x; i < bytes / int(sizeof(float4)); i += blockDim.x) {
            const float4 four = __ldcg(weights + i);
            kept += four.x + four.y + four.z + four.w;
        }
        __syncthreads();
    }
    if (kept == 12345.f) *out = kept;  // never: but the compiler does not know
}

}  // namespace probe
