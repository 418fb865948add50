// The shared memory of the block that runs.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "sanitizers.h"

namespace rnnkern::host {

constexpr int kMostShared = 227 << 10;  // as on compute capability 9.0

// Lies between two guards, in which nothing may be written.
class SharedMemory {
  public:
    SharedMemory() {
        void* pages =
            mmap(nullptr, kGuard + kMostShared + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) throw std::bad_alloc();
        first_ = static_cast<unsigned char*>(pages) + kGuard;
    }

    // For a new block: full of NaN, which no one has written.
    void begin(size_t bytes) {
        bytes_ = bytes;
        unsigned char* const pages = first_ - kGuard;
        sanitizer::forget(pages, kGuard + bytes + kGuard);
        sanitizer::allow(pages, kGuard + kMostShared + kGuard);
        std::memset(pages, kNanByte, kGuard + bytes + kGuard);
        sanitizer::forbid(pages, kGuard);
        sanitizer::forbid(first_ + bytes, kMostShared + kGuard - bytes);
    }

    bool guards_are_intact() const {
        for (size_t i = 1; i <= kGuard; ++i) {
            if (*(first_ - i) != kNanByte || first_[bytes_ + i - 1] != kNanByte) return false;
        }
        return true;
    }

    unsigned char* first() const { return first_; }
    size_t bytes() const { return bytes_; }
    ptrdiff_t offset(const void* address) const { return static_cast<const unsigned char*>(address) - first_; }

  private:
    static constexpr size_t kGuard = 128;
    static constexpr unsigned char kNanByte = 0xff;  // all bytes so: a NaN in every floating point format

    unsigned char* first_;
    size_t bytes_ = 0;
};

}  // namespace rnnkern::host
