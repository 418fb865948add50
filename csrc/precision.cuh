// The precisions of the sweeps: what is stored, what is computed in, and on which units the products run. Sums are
// float (double for float64).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "prims.cuh"
#include "sweep.h"

namespace rnnkern {
namespace precision {

struct float64 {
    using Element = double;
    using Real = double;
    static constexpr bool kTensorCores = false;
};

struct float32 {
    using Element = float;
    using Real = float;
    static constexpr bool kTensorCores = false;
};

// m16n8k8 on float operands, each rounded to 10 bits.
struct tf32 {
    using Element = float;
    using Real = float;
    static constexpr bool kTensorCores = true;
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_tf32(d, a, b);
    }
};

// m16n8k16.
struct bfloat16 {
    using Element = __nv_bfloat16;
    using Real = float;
    static constexpr bool kTensorCores = true;
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_bf16(d, a, b);
    }
};

struct float16 {
    using Element = __half;
    using Real = float;
    static constexpr bool kTensorCores = true;
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_f16(d, a, b);
    }
};

}  // namespace precision

__device__ __forceinline__ double to_real(double x) {
    return x;
}
__device__ __forceinline__ float to_real(float x) {
    return x;
}
__device__ __forceinline__ float to_real(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_real(__half x) {
    return __half2float(x);
}

__device__ __forceinline__ void store(double* to, double x) {
    *to = x;
}
__device__ __forceinline__ void store(float* to, float x) {
    *to = x;
}
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) {
    *to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void store(__half* to, float x) {
    *to = __float2half_rn(x);
}

}  // namespace rnnkern
