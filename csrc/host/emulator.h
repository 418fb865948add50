// Runs CUDA kernels on the CPU: the same sources, compiled by g++ with the headers of this folder in the place of
// CUDA's.
//
// Each CUDA thread is a fiber, a call stack of its own; all run in turn on the calling thread, so that a run can be
// repeated exactly. A fiber runs until it meets others (a barrier, a warp's collective). Blocks run one after the
// other: no kernel of ours lets blocks of one launch wait for each other. What a GPU would leave undefined (some
// threads at one barrier and some at another, a misaligned copy, a shared memory that is too small) ends the launch
// with cudaErrorLaunchFailure and a text, see cudaGetErrorString. Compiled with -fsanitize=thread or address, the
// kernels' accesses are watched too: ThreadSanitizer knows fibers as threads, ordered by barriers and __syncwarp alone,
// and blocks as not ordered at all; AddressSanitizer knows where shared memory ends.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <type_traits>

#include "cuda_language.h"

namespace rnnkern::host {

// 0: threads run in order. Any other seed shuffles them, always in the same way, and runs the last block first.
// Odd seeds: copy_async16 copies as late as it may, when waited for; even ones: at once.
void set_schedule(unsigned seed);

// Runs all blocks; `body` calls the kernel, once for each thread. Returns what went wrong, nothing if nothing did.
std::string run(dim3 grid, dim3 block_size, size_t shared_bytes, const std::function<void()>& body);

// Where in a kernel a primitive is used, for messages: the last parameter of each, defaulted.
struct Source {
    const char* file;
    int line;

    static constexpr Source here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator!=(const Source& other) const {
        return line != other.line || (file != other.file && std::strcmp(file, other.file) != 0);
    }
};

// Ends the launch. For use inside kernels, as everything below.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Source where, const char* format, ...);

unsigned char* dynamic_shared();
void block_barrier(Source where);
void warp_barrier(Source where);
unsigned lane_of_warp();

// `bytes` (0 or 16) of 16 bytes that go from global to shared memory, the rest of them zeros.
void copy_async(void* shared, const void* global, int bytes, Source where);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

// Ends the launch unless the 16 bytes are in the block's shared memory, and aligned.
void check_shared_row(const char* operation, const void* row, Source where);

// What one lane gives to the others in a collective of its warp.
struct alignas(16) LaneData {
    unsigned char bytes[48];
};

// Every lane gives its data, and gets the 32 of its warp, good until it calls again. Orders no memory accesses.
const LaneData* gather(const char* operation, const LaneData& mine, Source where);

template <class T>
class Lanes {
  public:
    explicit Lanes(const LaneData* data) : data_(data) {}
    const T& operator[](int lane) const { return *std::launder(reinterpret_cast<const T*>(data_[lane].bytes)); }

  private:
    const LaneData* data_;
};

template <class T>
Lanes<T> exchange(const char* operation, const T& mine, Source where) {
    static_assert(sizeof(T) <= sizeof(LaneData) && std::is_trivially_copyable_v<T>);
    LaneData data{};
    std::memcpy(data.bytes, &mine, sizeof(T));
    return Lanes<T>(gather(operation, data, where));
}

}  // namespace rnnkern::host
