// What the emulator keeps of a CUDA thread, and of threads that wait: for each other, or for their turn.
#pragma once

#include <array>
#include <cstddef>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace rnnkern::host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;  // of a block
constexpr size_t kMostCopies = 256;      // under way in a thread: reserved, since a fiber is no place to allocate in

inline std::string text_of(unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

struct Copy {
    void* shared;
    const void* global;
    int bytes;
    unsigned group;
    Source where;
};

struct Warp;

// A CUDA thread. They are kept from launch to launch.
struct Thread {
    explicit Thread(size_t stack_bytes) : fiber(stack_bytes) { copies.reserve(kMostCopies); }

    Fiber fiber;
    uint3 index{};
    Warp* warp = nullptr;
    unsigned lane = 0;
    bool finished = false;
    std::vector<Copy> copies;  // not waited for so far, oldest first
    unsigned groups = 0;       // of copies, committed
    const char* waits_in = nullptr;
    Source waits_at{};
};

// Threads that go on together, once all of them have come.
struct Meeting {
    explicit Meeting(size_t most) { waiting.reserve(most); }

    std::vector<Thread*> waiting;
    const char* operation = nullptr;
    Source where{};
    unsigned round = 0;
    std::array<void*, 2> tags{};  // of even and odd rounds: in the second next round, all have left this one
};

struct Warp {
    Meeting meeting{kWarp};
    std::array<std::array<LaneData, kWarp>, 2> gathered;  // likewise
};

// The threads that can go on, in a ring: each is in it once at most.
class Ready {
  public:
    void clear() { count_ = 0; }
    bool empty() const { return count_ == 0; }
    void add(Thread* thread) { at(count_++) = thread; }
    Thread* take() {
        if (shuffled) std::swap(at(0), at(random() % count_));
        Thread* thread = at(0);
        first_ = (first_ + 1) % kMostThreads;
        --count_;
        return thread;
    }

    bool shuffled = false;
    std::minstd_rand random;

  private:
    Thread*& at(unsigned i) { return ring_[(first_ + i) % kMostThreads]; }

    std::array<Thread*, kMostThreads> ring_{};
    unsigned first_ = 0;
    unsigned count_ = 0;
};

}  // namespace rnnkern::host
