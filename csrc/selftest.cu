#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "prims.cuh"
#include "selftest.h"

namespace rnnkern {
namespace {

constexpr unsigned kFullMask = 0xffffffff;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kUnusedBytes = 64 << 10;

__global__ void indices(const void*, void* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned number = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    static_cast<uint32_t*>(out)[number] = number;
}

template <int kUnused>
__global__ void reversed(const void* in, void* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory + kUnused);
    const int thread = threadIdx.x;
    shared[thread] = static_cast<const float*>(in)[thread];
    __syncthreads();
    static_cast<float*>(out)[thread] = shared[kThreads - 1 - thread];
}

__global__ void reversed_by_warp(const void* in, void* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x;
    shared[lane] = static_cast<const float*>(in)[lane];
    __syncwarp();
    static_cast<float*>(out)[lane] = shared[kWarp - 1 - lane];
}

template <class T>
__global__ void shuffled(const void* in, void* out) {
    const int lane = threadIdx.x;
    const T value = static_cast<const T*>(in)[lane];
    static_cast<T*>(out)[lane] = __shfl_xor_sync(kFullMask, value, 5);
    static_cast<T*>(out)[kWarp + lane] = __shfl_down_sync(kFullMask, value, 3);
}

__global__ void round_bfloat16(const void* in, void* out) {
    const int thread = threadIdx.x;
    static_cast<float*>(out)[thread] = __bfloat162float(__float2bfloat16_rn(static_cast<const float*>(in)[thread]));
}

__global__ void round_float16(const void* in, void* out) {
    const int thread = threadIdx.x;
    static_cast<float*>(out)[thread] = __half2float(__float2half_rn(static_cast<const float*>(in)[thread]));
}

__global__ void round_tf32(const void* in, void* out) {
    const int thread = threadIdx.x;
    static_cast<uint32_t*>(out)[thread] = to_tf32(static_cast<const float*>(in)[thread]);
}

__global__ void copied(const void* in, void* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    const int row = threadIdx.x;
    float4* shared = reinterpret_cast<float4*>(memory);
    copy_async16(shared + row, static_cast<const float4*>(in) + row, row % 2 ? 0 : 16);
    copy_async_commit();
    copy_async_wait<0>();
    static_cast<float4*>(out)[row] = shared[row];
}

// One row is being copied while the one before it is read, each in its own buffer.
__global__ void copied_in_groups(const void* in, void* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    constexpr int kRows = 8;
    constexpr int kColumns = 4 * kWarp;
    float* buffers = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x;
    const auto copy_row = [&](int row) {
        const float* from = static_cast<const float*>(in) + row * kColumns;
        if (row < kRows) copy_async16(buffers + row % 2 * kColumns + 4 * lane, from + 4 * lane, 16);
        copy_async_commit();  // empty behind the last row: a wait counts groups
    };
    copy_row(0);
    for (int row = 0; row < kRows; ++row) {
        copy_row(row + 1);
        copy_async_wait<1>();
        __syncthreads();
        const float* buffer = buffers + row % 2 * kColumns;
        float* to = static_cast<float*>(out) + row * kColumns;
        for (int i = lane; i < kColumns; i += kWarp) to[i] = buffer[kColumns - 1 - i];
        __syncthreads();
    }
}

// kRows rows of 16 bytes each, as they are.
template <int kRows>
__device__ __forceinline__ unsigned char* rows_in_shared(const void* in) {
    RNNKERN_DYNAMIC_SHARED(memory);
    const int lane = threadIdx.x;
    if (lane < kRows) reinterpret_cast<uint4*>(memory)[lane] = static_cast<const uint4*>(in)[lane];
    __syncwarp();
    return memory;
}

__global__ void loaded_x4(const void* in, void* out) {
    const int lane = threadIdx.x;
    uint32_t words[4];
    load_matrix_x4(words, rows_in_shared<32>(in) + 16 * lane);
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(out)[4 * lane + i] = words[i];
}

__global__ void loaded_x2(const void* in, void* out) {
    const int lane = threadIdx.x;
    uint32_t words[2];
    load_matrix_x2(words, rows_in_shared<16>(in) + 16 * (lane % 16));
    for (int i = 0; i < 2; ++i) static_cast<uint32_t*>(out)[2 * lane + i] = words[i];
}

struct Bfloat16 {
    using Stored = __nv_bfloat16;
    static __device__ __forceinline__ Stored rounded(float x) { return __float2bfloat16_rn(x); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_bf16(d, a, b);
    }
};

struct Float16 {
    using Stored = __half;
    static __device__ __forceinline__ Stored rounded(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_f16(d, a, b);
    }
};

struct Tf32 {
    using Stored = uint32_t;
    static __device__ __forceinline__ Stored rounded(float x) { return to_tf32(x); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_tf32(d, a, b);
    }
};

constexpr int kRowBytes = 32;  // of a, and of b's columns, along k
constexpr int kRowsOfA = 16;
constexpr int kColumnsOfB = 8;

template <class Type>
__global__ void multiplied(const void* in, void* out) {
    RNNKERN_DYNAMIC_SHARED(memory);
    constexpr int kDepth = kRowBytes / sizeof(typename Type::Stored);
    using Row = typename Type::Stored[kDepth];
    Row* a = reinterpret_cast<Row*>(memory);
    Row* b = a + kRowsOfA;
    const float* a_in = static_cast<const float*>(in);
    const float* b_in = a_in + kRowsOfA * kDepth;
    const float* d_in = b_in + kDepth * kColumnsOfB;
    const int lane = threadIdx.x;
    for (int i = lane; i < kRowsOfA * kDepth; i += kWarp) a[i / kDepth][i % kDepth] = Type::rounded(a_in[i]);
    for (int i = lane; i < kDepth * kColumnsOfB; i += kWarp)
        b[i % kColumnsOfB][i / kColumnsOfB] = Type::rounded(b_in[i]);
    __syncwarp();
    uint32_t a_words[4];
    uint32_t b_words[2];
    load_matrix_x4(a_words, reinterpret_cast<const unsigned char*>(a + lane % 16) + lane / 16 * 16);
    load_matrix_x2(b_words, reinterpret_cast<const unsigned char*>(b + lane % 8) + lane / 8 % 2 * 16);
    const int corner = lane / 4 * kColumnsOfB + lane % 4 * 2;
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = d_in[corner + i / 2 * 8 * kColumnsOfB + i % 2];
    Type::multiply(d, a_words, b_words);
    for (int i = 0; i < 4; ++i) static_cast<float*>(out)[corner + i / 2 * 8 * kColumnsOfB + i % 2] = d[i];
}

struct SelfTest {
    const char* name;
    void (*kernel)(const void* in, void* out);
    dim3 block;
    int shared_bytes;
    dim3 grid = dim3(1);
};

constexpr int kRowsBytes = kThreads * sizeof(float);
constexpr int kOperandBytes = (kRowsOfA + kColumnsOfB) * kRowBytes;

const SelfTest kSelfTests[] = {
    {"indices", indices, dim3(8, 4, 2), 0, dim3(2, 2, 3)},
    {"barrier", reversed<0>, dim3(kThreads), kRowsBytes},
    {"large_shared", reversed<kUnusedBytes>, dim3(kThreads), kUnusedBytes + kRowsBytes},
    {"syncwarp", reversed_by_warp, dim3(kWarp), kWarp * sizeof(float)},
    {"shuffle_float", shuffled<float>, dim3(kWarp), 0},
    {"shuffle_double", shuffled<double>, dim3(kWarp), 0},
    {"shuffle_int", shuffled<int>, dim3(kWarp), 0},
    {"bfloat16", round_bfloat16, dim3(kThreads), 0},
    {"float16", round_float16, dim3(kThreads), 0},
    {"to_tf32", round_tf32, dim3(kThreads), 0},
    {"copy_async", copied, dim3(kWarp), 16 * kWarp},
    {"copy_async_groups", copied_in_groups, dim3(kWarp), 2 * 16 * kWarp},
    {"load_matrix_x4", loaded_x4, dim3(kWarp), 32 * 16},
    {"load_matrix_x2", loaded_x2, dim3(kWarp), 16 * 16},
    {"mma_bf16", multiplied<Bfloat16>, dim3(kWarp), kOperandBytes},
    {"mma_f16", multiplied<Float16>, dim3(kWarp), kOperandBytes},
    {"mma_tf32", multiplied<Tf32>, dim3(kWarp), kOperandBytes},
};

cudaError_t run(const SelfTest& test, const void* in, void* out, cudaStream_t stream) {
    const cudaError_t error =
        cudaFuncSetAttribute(test.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, test.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = test.grid;
    config.blockDim = test.block;
    config.dynamicSmemBytes = test.shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, test.kernel, in, out);
}

}  // namespace

cudaError_t selftest(const char* name, const void* in, void* out, cudaStream_t stream) {
    for (const SelfTest& test : kSelfTests) {
        if (std::strcmp(test.name, name) == 0) return run(test, in, out, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace rnnkern
