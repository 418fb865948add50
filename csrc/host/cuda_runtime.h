// Stands in for CUDA's header of this name: the part of the runtime and of the device functions that rnnkern uses.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#include "emulator.h"

#define CUDART_VERSION 0  // no CUDA is there

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

// After cudaErrorLaunchFailure: what this thread's last failed launch did wrong, until its next one fails.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace rnnkern::host {

// Returns when all blocks have run; `body` calls the kernel, once for each thread.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class T>
T shuffle(const char* operation, unsigned mask, const T& value, unsigned from, Source where) {
    if (mask != ~0u) fail(where, "%s: the mask is %08x; only whole warps (ffffffff) are emulated", operation, mask);
    const Lanes<T> lanes = exchange(operation, value, where);
    return lanes[from < 32 ? from : lane_of_warp()];
}

}  // namespace rnnkern::host

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return rnnkern::host::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    return rnnkern::host::launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, values); });
}

inline void __syncthreads(rnnkern::host::Source where = rnnkern::host::Source::here()) {
    rnnkern::host::block_barrier(where);
}

inline void __syncwarp(rnnkern::host::Source where = rnnkern::host::Source::here()) {
    rnnkern::host::warp_barrier(where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, rnnkern::host::Source where = rnnkern::host::Source::here()) {
    const unsigned from = rnnkern::host::lane_of_warp() ^ static_cast<unsigned>(lane_mask);
    return rnnkern::host::shuffle("__shfl_xor_sync", mask, value, from, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   rnnkern::host::Source where = rnnkern::host::Source::here()) {
    const unsigned from = rnnkern::host::lane_of_warp() + delta;
    return rnnkern::host::shuffle("__shfl_down_sync", mask, value, from, where);
}
