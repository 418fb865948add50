// What it takes until all threads of a block, of a cluster or of the whole grid have come to the same place.
#pragma once
#include <cooperative_groups.h>

namespace probe {

// What a loop itself costs: one multiplication that needs the one before.
__global__ void dependent_fma(int iterations, float* out) {
    float x = threadIdx.x;
    for (int i = 0; i < iterations; ++i) x = fmaf(x, 1.0001f, 0.5f);
    if (x == 12345.f) *out = x;  // never: but the compiler does not know
}

__global__ void block_barrier(int iterations) {
    for (int i = 0; i < iterations; ++i) __syncthreads();
}

__global__ void cluster_barrier(int iterations) {
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    for (int i = 0; i < iterations; ++i) cluster.sync();
}

__global__ void grid_barrier_of_cuda(int iterations) {
    cooperative_groups::grid_group grid = cooperative_groups::this_grid();
    for (int i = 0; i < iterations; ++i) grid.sync();
}

// Waits until all blocks have come here `times` times: one thread of each adds to a counter and looks until it is full.
__device__ __forceinline__ void wait_for_grid(unsigned* counter, unsigned times) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(1u) : "memory");
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < gridDim.x * times);
    }
    __syncthreads();
}

__global__ void grid_barrier_by_counter(int iterations, unsigned* counter) {
    for (int i = 0; i < iterations; ++i) wait_for_grid(counter, unsigned(i + 1));
}

}  // namespace probe
