// The primitives that CUDA C++ has no function for: the only file with inline PTX. csrc/host/prims.h has a twin of each
// for the host.
#pragma once
#ifdef RNNKERN_HOST
#include "host/prims.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

// A block's dynamic shared memory as `unsigned char* name`.
#define RNNKERN_DYNAMIC_SHARED(name)                                       \
    extern __shared__ __align__(128) unsigned char rnnkern_shared_bytes[]; \
    unsigned char* const name = rnnkern_shared_bytes

namespace rnnkern {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory, the first `bytes` (0 or 16) of them from global memory, zeros behind.
// Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// Makes a group of the copies that this thread has started since the last group.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way. Other threads see the data after a
// barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four (two) 8 x 8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix l /
// 8, and gets in r[m] the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), spread over a warp: with g = lane / 4 and q = lane % 4
//     a[0] (g, 2q..), a[1] (g + 8, 2q..), a[2] (g, 2q + 8..), a[3] (g + 8, 2q + 8..)       two numbers each
//     b[0] (2q.., g), b[1] (2q + 8.., g)                                                   two numbers each
//     d[0] (g, 2q), d[1] (g, 2q + 1), d[2] (g + 8, 2q), d[3] (g + 8, 2q + 1)
#define RNNKERN_MMA(shape_and_types)                                                \
    asm volatile("mma.sync.aligned." shape_and_types                                \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    RNNKERN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    RNNKERN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// d (16 x 8) += a (16 x 8) b (8 x 8) of numbers that to_tf32 gives: a[0] (g, q), a[1] (g + 8, q), a[2] (g, q + 4), a[3]
// (g + 8, q + 4), b[0] (q, g), b[1] (q + 4, g), d as above.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    RNNKERN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef RNNKERN_MMA

// The nearest number with 10 bits behind the point, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

}  // namespace rnnkern
#endif
