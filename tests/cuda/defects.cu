#include <cstdint>
#include <cstring>

#include "defects.h"
#include "prims.cuh"

namespace rnnkern {
namespace {

constexpr unsigned kFullMask = 0xffffffff;
constexpr int kThreads = 64;
constexpr int kSharedBytes = kThreads * 16;

// What ends the launch, whatever the schedule.

__global__ void two_barriers(float* numbers) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    numbers[threadIdx.x] = 0;
}

__global__ void early_end(float* numbers) {
    if (threadIdx.x == 7) return;
    __syncthreads();
    numbers[threadIdx.x] = 0;
}

__global__ void two_shuffles(float* numbers) {
    float& number = numbers[threadIdx.x];
    if (threadIdx.x % 2) {
        number = __shfl_xor_sync(kFullMask, number, 1);
    } else {
        number = __shfl_down_sync(kFullMask, number, 1);
    }
}

__global__ void half_a_warp(float* numbers) {
    if (threadIdx.x % 32 < 16) numbers[threadIdx.x] = __shfl_xor_sync(kFullMask, numbers[threadIdx.x], 1);
}

__global__ void part_of_a_mask(float* numbers) {
    if (threadIdx.x < 16) numbers[threadIdx.x] = __shfl_xor_sync(0xffff, numbers[threadIdx.x], 1);
}

__global__ void no_wait(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 16 * threadIdx.x, numbers, 16);
    copy_async_commit();
}

__global__ void no_commit(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 16 * threadIdx.x, numbers, 16);
    copy_async_wait<0>();
}

__global__ void copy_from_misaligned(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 16 * threadIdx.x, numbers + 1, 16);
}

__global__ void copy_to_misaligned(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 8, numbers, 16);
}

__global__ void copy_beyond_shared(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + kSharedBytes, numbers, 16);
}

__global__ void copy_of_8_bytes(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 16 * threadIdx.x, numbers, 8);
}

__global__ void matrix_misaligned(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    uint32_t words[4];
    load_matrix_x4(words, memory + 4 * threadIdx.x);
    numbers[threadIdx.x] = words[0];
}

__global__ void matrix_not_in_shared(float* numbers) {
    uint32_t words[2];
    load_matrix_x2(words, numbers);
    numbers[threadIdx.x] = words[0];
}

__global__ void tf32_not_rounded(float*) {
    const uint32_t third = 0x3eaaaaab;
    float d[4] = {};
    const uint32_t a[4] = {third, third, third, third};
    const uint32_t b[2] = {third, third};
    mma_tf32(d, a, b);
}

__global__ void shared_overrun(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    if (threadIdx.x == 0) shared[kSharedBytes / sizeof(float)] = numbers[0];
}

__global__ void nothing(float*) {}

// What one schedule or another shows.

__global__ void read_before_wait(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory) + 4 * threadIdx.x;
    copy_async16(shared, numbers + 4 * (threadIdx.x % 32), 16);
    copy_async_commit();
    numbers[128 + threadIdx.x] = shared[0];
    copy_async_wait<0>();
}

__global__ void no_barrier(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = numbers[threadIdx.x];
    numbers[128 + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// What the sanitizers find.

__global__ void shuffle_for_barrier(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = numbers[threadIdx.x];
    __shfl_xor_sync(kFullMask, numbers[threadIdx.x], 1);
    numbers[128 + threadIdx.x] = shared[threadIdx.x ^ 1];
}

// The copy may begin while others still read; that it is waited for behind the barrier doesn't help.
__global__ void copy_into_what_is_read(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = 0;
    __syncthreads();
    numbers[128 + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
    if (threadIdx.x < kThreads / 4) copy_async16(shared + 4 * threadIdx.x, numbers, 16);
    copy_async_commit();
    __syncthreads();
    copy_async_wait<0>();
}

// The copy may go on behind the barrier: it is not waited for before.
__global__ void copy_of_another_thread(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    copy_async16(shared + 4 * threadIdx.x, numbers, 16);
    copy_async_commit();
    __syncthreads();
    numbers[128 + threadIdx.x] = shared[4 * (kThreads - 1 - threadIdx.x)];
    copy_async_wait<0>();
}

__global__ void blocks_meet(float* numbers) {
    __syncthreads();
    if (threadIdx.x == 0) numbers[0] = blockIdx.x;
}

__global__ void global_overrun(float* numbers) {
    if (threadIdx.x == 0) numbers[128] = numbers[kNumbers];
}

__global__ void copy_beyond_global(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    copy_async16(memory + 16 * threadIdx.x, numbers + kNumbers, 16);
}

// Nothing wrong: blocks of one launch have the same shared memory, one after the other.

__global__ void right(float* numbers) {
    RNNKERN_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const int number = blockIdx.x * kThreads + threadIdx.x;
    shared[threadIdx.x] = numbers[number];
    __syncthreads();
    numbers[128 + number] = shared[kThreads - 1 - threadIdx.x];
}

struct Defect {
    const char* name;
    void (*kernel)(float*);
    int shared_bytes = kSharedBytes;
    int blocks = 1;
    int threads = kThreads;
};

#define RNNKERN_DEFECT(kernel) {#kernel, kernel}

const Defect kDefects[] = {
    RNNKERN_DEFECT(two_barriers),
    RNNKERN_DEFECT(early_end),
    RNNKERN_DEFECT(two_shuffles),
    RNNKERN_DEFECT(half_a_warp),
    RNNKERN_DEFECT(part_of_a_mask),
    RNNKERN_DEFECT(no_wait),
    RNNKERN_DEFECT(no_commit),
    RNNKERN_DEFECT(copy_from_misaligned),
    RNNKERN_DEFECT(copy_to_misaligned),
    RNNKERN_DEFECT(copy_beyond_shared),
    RNNKERN_DEFECT(copy_of_8_bytes),
    RNNKERN_DEFECT(matrix_misaligned),
    RNNKERN_DEFECT(matrix_not_in_shared),
    RNNKERN_DEFECT(tf32_not_rounded),
    RNNKERN_DEFECT(shared_overrun),
    RNNKERN_DEFECT(read_before_wait),
    RNNKERN_DEFECT(no_barrier),
    RNNKERN_DEFECT(shuffle_for_barrier),
    RNNKERN_DEFECT(copy_into_what_is_read),
    RNNKERN_DEFECT(copy_of_another_thread),
    {"blocks_meet", blocks_meet, kSharedBytes, 2},
    RNNKERN_DEFECT(global_overrun),
    RNNKERN_DEFECT(copy_beyond_global),
    {"too_much_shared", nothing, (48 << 10) + 1},
    {"too_many_threads", nothing, 0, 1, 1025},
    {"no_blocks", nothing, 0, 0},
    {"right", right, kSharedBytes, 2},
};

cudaError_t run(const Defect& defect, float* numbers) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(defect.blocks);
    config.blockDim = dim3(defect.threads);
    config.dynamicSmemBytes = defect.shared_bytes;
    return cudaLaunchKernelEx(&config, defect.kernel, numbers);
}

}  // namespace

cudaError_t defect(const char* name, float* numbers) {
    if (std::strcmp(name, "too_much_allowed") == 0) {
        return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1);
    }
    for (const Defect& each : kDefects) {
        if (std::strcmp(each.name, name) == 0) return run(each, numbers);
    }
    return cudaErrorInvalidValue;
}

}  // namespace rnnkern
