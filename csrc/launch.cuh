// What the kernels of the general tier share: their place in a step, and how they are launched.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "product.cuh"
#include "steps.h"

namespace rnnkern {

// What a block works on: a tile of sequences and one of units, in one direction.
struct Place {
    const Sizes& sizes;
    const Sequences& sequences;
    int64_t first_position, first_unit;
    int direction;

    __device__ __forceinline__ Place(const Sizes& sizes, const Sequences& sequences, int rows, int units)
        : sizes(sizes),
          sequences(sequences),
          first_position(int64_t(blockIdx.x) * rows),
          first_unit(int64_t(blockIdx.y) * units),
          direction(blockIdx.z) {}

    // The sequence at a position of the order, longest first, in which tiles take them.
    __device__ __forceinline__ int64_t sequence(int64_t position) const {
        return sequences.order == nullptr ? position : sequences.order[position];
    }

    __device__ __forceinline__ bool has(const Moment& moment, int64_t position) const {
        if (position >= moment.count) return false;
        return sequences.lengths == nullptr || moment.index < sequences.lengths[sequence(position)];
    }

    template <class T>
    __device__ __forceinline__ T* row(const Rows& rows, const Moment& moment, int64_t sequence) const {
        return static_cast<T*>(rows.data) + moment.index * rows.step + sequence * rows.sequence +
               direction * rows.direction;
    }

    // The numbers of one sequence in a (D, B, width) buffer.
    template <class T>
    __device__ __forceinline__ T* state(T* states, int64_t sequence, int64_t width) const {
        return states + (direction * sizes.batch + sequence) * width;
    }
};

inline bool aligned_pointer(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Whether rows of `depth` numbers of `size` bytes can be read by vectors, `apart` being the distances between rows.
inline bool aligned_rows(const void* data, int64_t size, int64_t depth, std::initializer_list<int64_t> apart) {
    bool all = aligned_pointer(data) && depth * size % kVectorBytes == 0;
    for (int64_t distance : apart) all = all && distance * size % kVectorBytes == 0;
    return all;
}

inline bool aligned_rows(const Rows& rows, int64_t size, int64_t depth) {
    return aligned_rows(rows.data, size, depth, {rows.step, rows.sequence, rows.direction});
}

// Whether what meets W_hh in a forward sweep can be read by vectors.
inline bool aligned_operand(const ForwardSweep& sweep, int64_t size) {
    const int64_t depth = sweep.sizes.outputs;
    if (sweep.u != nullptr) return aligned_rows(sweep.u, size, depth, {});
    return aligned_rows(sweep.y, size, depth) && aligned_rows(sweep.h0, size, depth, {});
}

// Launches kernels on a stream until one fails.
class Launcher {
  public:
    explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

    // One block for each tile of `rows` out of `positions` sequences, of `units` out of `width`, and for each
    // direction.
    template <class... Parameters, class... Arguments>
    void operator()(const char* name, void (*kernel)(Parameters...), int shared_bytes, const Sizes& sizes,
                    int64_t positions, int rows, int64_t width, int units, const Arguments&... arguments) {
        if (failure_.error != cudaSuccess || positions == 0) return;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(unsigned((positions + rows - 1) / rows), unsigned((width + units - 1) / units),
                              unsigned(sizes.directions));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream_;
        if (succeeded(name, cudaLaunchKernelEx(&config, kernel, arguments...))) ++failure_.launch;
    }

    // Lets a kernel have that much dynamic shared memory: once before its launches.
    template <class... Parameters>
    void allow(const char* name, void (*kernel)(Parameters...), int shared_bytes) {
        if (failure_.error != cudaSuccess) return;
        succeeded(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }

    const Failure& failure() const { return failure_; }

  private:
    bool succeeded(const char* name, cudaError_t error) {
        if (error == cudaSuccess) return true;
        cudaGetLastError();  // taken: the next call must not find it
        failure_.error = error;
        failure_.kernel = name;
        return false;
    }

    cudaStream_t stream_;
    Failure failure_ = {cudaSuccess, nullptr, 0};
};

// Whether a sweep takes large tiles, of `rows` x `units`: automatically, when they are enough blocks for every
// multiprocessor to have one.
inline bool takes_large(Tile tile, const Sizes& sizes, int rows, int units) {
    if (tile != Tile::automatic) return tile == Tile::large;
    int device = 0, multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return false;
    const int64_t blocks = (sizes.batch + rows - 1) / rows * ((sizes.hidden + units - 1) / units) * sizes.directions;
    return blocks >= multiprocessors;
}

}  // namespace rnnkern
