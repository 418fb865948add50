// What it takes until every block has the part of h that every other block computed: each owns `slice` numbers, adds
// one to them and gives them to all. There are two buffers, so that one can be read while the other is written.
#pragma once
#include <cooperative_groups.h>

#include <cstdint>

#include "../../csrc/prims.cuh"
#include "barriers.cuh"

namespace probe {

constexpr int kBuffers = 2;

// Bytes of shared memory of a block that takes part in an exchange.
constexpr int exchange_bytes(int cluster, int slice) {
    return kBuffers * cluster * slice * int(sizeof(float));
}

// By stores to the others' shared memory and a cluster barrier a step.
__global__ void exchange_by_barrier(int iterations, int slice, float* out) {
    extern __shared__ float h[];  // (kBuffers, all)
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    const int blocks = cluster.num_blocks();
    const int own = cluster.block_rank() * slice;
    const int all = blocks * slice;
    for (int i = threadIdx.x; i < kBuffers * all; i += blockDim.x) h[i] = 0.f;
    cluster.sync();
    for (int t = 0; t < iterations; ++t) {
        const float* from = h + t % kBuffers * all;
        float* to = h + (t + 1) % kBuffers * all;
        for (int i = threadIdx.x; i < slice; i += blockDim.x) {
            const float value = from[own + i] + 1.f;
            for (int rank = 0; rank < blocks; ++rank) cluster.map_shared_rank(to, rank)[own + i] = value;
        }
        cluster.sync();
    }
    const int next = (own + slice) % all;
    if (threadIdx.x == 0) out[blockIdx.x] = h[iterations % kBuffers * all + next];
}

// The same address in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// A phase ends when this has been said once, and so many bytes have come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n"
            ".reg .pred complete;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete;\n"
            "}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// A store to another block that its barrier counts.
__device__ __forceinline__ void store_async(uint32_t address, float value, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(__float_as_uint(value)), "r"(barrier)
                 : "memory");
}

// By stores that the receiver's own barrier counts: nobody waits for the whole cluster.
__global__ void exchange_by_stores(int iterations, int slice, float* out) {
    extern __shared__ float h[];  // (kBuffers, all)
    __shared__ alignas(8) uint64_t barriers[kBuffers];
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    const int blocks = cluster.num_blocks();
    const int own = cluster.block_rank() * slice;
    const int all = blocks * slice;
    const uint32_t bytes = all * sizeof(float);
    for (int i = threadIdx.x; i < kBuffers * all; i += blockDim.x) h[i] = 0.f;
    if (threadIdx.x == 0) {
        for (uint64_t& barrier : barriers) barrier_init(rnnkern::shared_address(&barrier));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (uint64_t& barrier : barriers) barrier_expect(rnnkern::shared_address(&barrier), bytes);
    }
    cluster.sync();
    for (int t = 0; t < iterations; ++t) {
        const float* from = h + t % kBuffers * all;
        float* to = h + (t + 1) % kBuffers * all;
        const uint32_t barrier = rnnkern::shared_address(&barriers[(t + 1) % kBuffers]);
        for (int i = threadIdx.x; i < slice; i += blockDim.x) {
            const float value = from[own + i] + 1.f;
            const uint32_t address = rnnkern::shared_address(to + own + i);
            for (int rank = 0; rank < blocks; ++rank) {
                store_async(in_block(address, rank), value, in_block(barrier, rank));
            }
        }
        barrier_wait(barrier, t / kBuffers % 2);  // a buffer's turn comes every second step
        __syncthreads();                          // all have seen the phase before it is armed again
        if (threadIdx.x == 0) barrier_expect(barrier, bytes);
    }
    cluster.sync();  // nobody leaves while others store to it
    const int next = (own + slice) % all;
    if (threadIdx.x == 0) out[blockIdx.x] = h[iterations % kBuffers * all + next];
}

// Through global memory, so the L2 cache, with a barrier of the grid a step. `out` is the largest error: zero.
__global__ void exchange_by_memory(int iterations, int slice, float* h, unsigned* counter, float* out) {
    const int all = gridDim.x * slice;
    float error = 0.f;
    for (int t = 0; t < iterations; ++t) {
        float* to = h + t % kBuffers * all;
        for (int i = threadIdx.x; i < slice; i += blockDim.x) __stcg(to + blockIdx.x * slice + i, float(t));
        wait_for_grid(counter, unsigned(t + 1));
        for (int i = threadIdx.x; i < all; i += blockDim.x) error = fmaxf(error, fabsf(__ldcg(to + i) - float(t)));
    }
    if (threadIdx.x == 0) out[blockIdx.x] = error;
}

}  // namespace probe
