// The runtime functions of cuda_runtime.h.
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "cuda_runtime.h"
#include "shared_memory.h"
#include "threads.h"

namespace rnnkern::host {
namespace {

constexpr int kSharedByDefault = 48 << 10;
constexpr int kMultiprocessors = 4;  // few, so that small sizes fill this device too

std::mutex one_attribute;
std::unordered_map<const void*, int> allowed_shared;  // by kernel

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaError_t explained_error = cudaSuccess;  // the one that the explanation is about
thread_local std::string explanation;

int allowed_for(const void* kernel) {
    const std::lock_guard<std::mutex> lock(one_attribute);
    const auto found = allowed_shared.find(kernel);
    return found == allowed_shared.end() ? kSharedByDefault : found->second;
}

cudaError_t explain(cudaError_t error, std::string text) {
    last_error = error;
    explained_error = error;
    explanation = std::move(text);
    return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
    const dim3 grid = config.gridDim;
    const dim3 block = config.blockDim;
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    if (count < 1 || count > kMostThreads || block.z > 64) {
        return explain(cudaErrorInvalidConfiguration, "a block has 1 to 1024 threads, at most 64 along z; this one " +
                                                          text_of(block.x, block.y, block.z));
    }
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        return explain(cudaErrorInvalidConfiguration,
                       "a grid has 1 to (2^31 - 1, 65535, 65535) blocks; this one " + text_of(grid.x, grid.y, grid.z));
    }
    const int allowed = allowed_for(kernel);
    if (config.dynamicSmemBytes > static_cast<size_t>(allowed)) {
        return explain(cudaErrorInvalidValue, "the launch asks for " + std::to_string(config.dynamicSmemBytes) +
                                                  " bytes of shared memory, and the kernel has leave for " +
                                                  std::to_string(allowed) + ": see cudaFuncSetAttribute");
    }
    return cudaSuccess;
}

const char* general_text(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice:
            return "no kernel image is available for execution on the device";
        case cudaErrorLaunchFailure:
            return "unspecified launch failure";
    }
    return "unrecognized error code";
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
    const cudaError_t refused = check(config, kernel);
    if (refused != cudaSuccess) return refused;
    std::string wrong = run(config.gridDim, config.blockDim, config.dynamicSmemBytes, body);
    return wrong.empty() ? cudaSuccess : explain(cudaErrorLaunchFailure, std::move(wrong));
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
        return explain(cudaErrorInvalidValue, "a kernel has no attribute " + std::to_string(attribute));
    }
    if (value < 0 || value > kMostShared) {
        return explain(cudaErrorInvalidValue, "a block has at most " + std::to_string(kMostShared) +
                                                  " bytes of shared memory, not " + std::to_string(value));
    }
    const std::lock_guard<std::mutex> lock(one_attribute);
    allowed_shared[kernel] = value > kSharedByDefault ? value : kSharedByDefault;
    return cudaSuccess;
}

}  // namespace rnnkern::host

using namespace rnnkern::host;

const char* cudaGetErrorString(cudaError_t error) {
    return error != cudaSuccess && error == explained_error ? explanation.c_str() : general_text(error);
}

cudaError_t cudaGetLastError() {
    return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess
                       : explain(cudaErrorInvalidDevice, "the only device is 0, not " + std::to_string(device));
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : kMostShared;
    return cudaSuccess;
}
