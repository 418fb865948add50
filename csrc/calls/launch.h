// How the compiled sweeps of a call are started: rnnkern/backends/numba_cpu/launch.py, which lays this out, in C++.
//
// One array of 64-bit integers has the operands of each direction and the work of each team. A call copies it and fills
// in where its tensors lie, and where the copy does. Then the regions run one after the other, each a kernel over
// shares, the four integers that it takes. The first of them is an address, relative to the copy.

#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace rnnkern {

using Integer = std::int64_t;
using Share = std::array<Integer, 4>;

// An address in a call's array: its position, the number of a tensor (0 is the array itself), and how far behind it.
using Field = std::array<Integer, 3>;

struct Region {
    Integer kernel;  // its address
    bool wide;       // it takes a float64 behind the integers, and else a float32
    std::vector<Share> shares;
    Integer taking;  // the address of what each thread of the team runs, 0 where the calling thread runs all shares
    Integer work;    // which byte of the array the team's work begins at

    void run(const Share& share, Integer base) const {
        const auto [address, first, last, part] = share;
        if (wide) {
            reinterpret_cast<void* (*)(Integer, Integer, Integer, Integer, double)>(kernel)(base + address, first, last,
                                                                                            part, 0.0);
        } else {
            reinterpret_cast<void* (*)(Integer, Integer, Integer, Integer, float)>(kernel)(base + address, first, last,
                                                                                           part, 0.0f);
        }
    }
};

// Whether this process is a fork: no OpenMP team survives one.
inline std::atomic<bool> forked{false};

// Of what planned layers note of their calls. One for all, since a fork must find it free: its child would wait for a
// thread that it does not have. Nothing that needs the GIL happens under it, for who forks may hold that.
inline std::mutex notes;

inline void watch_forks() {
    pthread_atfork([] { notes.lock(); }, [] { notes.unlock(); },
                   [] {
                       notes.unlock();
                       forked = true;
                   });
}

class Launch {
  public:
    Launch(std::vector<Integer> integers, std::vector<Field> fields, std::vector<Region> regions, Integer enter)
        : integers_(std::move(integers)), fields_(std::move(fields)), regions_(std::move(regions)), enter_(enter) {}

    // Runs all regions; `addresses` are those of the call's tensors, the first one left free for the array's own.
    void operator()(std::vector<Integer>& addresses, int threads) const {
        std::vector<Integer> operands = integers_;
        const auto base = addresses[0] = reinterpret_cast<Integer>(operands.data());
        for (const auto& [position, tensor, offset] : fields_) {
            operands[position] = addresses[tensor] + offset;
        }
        for (const auto& region : regions_) {
            if (region.taking == 0) {
                for (const auto& share : region.shares) region.run(share, base);
            } else if (enter_ != 0 && !forked) {
                reinterpret_cast<void (*)(Integer, Integer, unsigned, unsigned)>(enter_)(
                    region.taking, base + region.work, static_cast<unsigned>(threads), 0);
            } else {
                on_own_threads(region, base);
            }
        }
    }

  private:
    static void on_own_threads(const Region& region, Integer base) {
        std::vector<std::jthread> others;  // which are waited for, even if one of them cannot be had
        for (std::size_t i = 1; i < region.shares.size(); ++i) {
            others.emplace_back([&region, base, i] { region.run(region.shares[i], base); });
        }
        region.run(region.shares[0], base);
    }

    std::vector<Integer> integers_;
    std::vector<Field> fields_;
    std::vector<Region> regions_;
    Integer enter_;  // the address of GOMP_parallel, 0 where there is none
};

}  // namespace rnnkern
