// The scheduler behind emulator.h. Compiled without sanitizers, always: what it does for a kernel's thread must not
// count as an access of that thread.
#include "emulator.h"

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"
#include "shared_memory.h"
#include "threads.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace rnnkern::host {
namespace {

// ThreadSanitizer takes all that a fiber does for ordered, and so two blocks on the same fibers, once each has come to
// a barrier. It makes a fiber in half a millisecond: too slow to have new ones for each block. So blocks take turns on
// this many sets, and two of them race unseen only if they are a multiple of it apart.
const unsigned fiber_sets = sanitizer::watches_order() ? 3 : 1;

// What outlives a launch, for the one that has the lock.
std::mutex one_launch;
unsigned schedule = 0;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::unique_ptr<Warp>> warps;
Meeting barrier{kMostThreads};
Fiber host_fiber;
SharedMemory shared_memory;

// The launch that runs.
const std::function<void()>* body;
unsigned block_threads;
bool copies_late;
std::array<char, 1024> failure;   // a text; empty while all is well
char launch_begins, launch_ends;  // tags

// The block that runs.
Ready ready;
Thread* current;
const std::unique_ptr<Thread>* block;  // its threads
unsigned unfinished;

// New tags for each block, or ThreadSanitizer would take blocks for ordered. Used in a circle: a tag met again much
// later can only hide a race.
void* new_tag() {
    static std::array<uint64_t, 1 << 14> tags;
    static unsigned next = 0;
    return &tags[next++ % tags.size()];
}

bool aligned(const void* from) {
    return reinterpret_cast<uintptr_t>(from) % 16 == 0;
}

// Goes on with whoever can, or with the host.
void leave(bool for_good) {
    Thread* const self = current;
    if (ready.empty()) {
        self->fiber.switch_to(host_fiber, for_good);
        return;
    }
    current = ready.take();
    threadIdx = current->index;
    self->fiber.switch_to(current->fiber, for_good);
}

// Waits until all `expected` have come; returns which round of this meeting it was.
unsigned meet(Meeting& meeting, unsigned expected, const char* operation, bool orders_memory, Source where) {
    if (!meeting.waiting.empty() && (meeting.operation != operation || meeting.where != where)) {
        fail(where, "threads diverge: some wait in %s at %s:%d, another comes to %s", meeting.operation,
             meeting.where.file, meeting.where.line, operation);
    }
    const unsigned round = meeting.round;
    void* const tag = meeting.tags[round % 2];
    if (orders_memory) sanitizer::release(tag);
    if (meeting.waiting.size() + 1 < expected) {
        meeting.operation = operation;
        meeting.where = where;
        meeting.waiting.push_back(current);
        current->waits_in = operation;
        current->waits_at = where;
        leave(false);
    } else {
        for (Thread* const thread : meeting.waiting) ready.add(thread);
        meeting.waiting.clear();
        ++meeting.round;
    }
    if (orders_memory) sanitizer::acquire(tag);
    return round;
}

struct alignas(16) Chunk {
    unsigned char bytes[16];
};

void carry_out(const Copy& copy) {
    sanitizer::copying(copy.shared, copy.global, sizeof(Chunk), copy.bytes);
    *static_cast<Chunk*>(copy.shared) = copy.bytes ? *static_cast<const Chunk*>(copy.global) : Chunk{};
}

// What each fiber runs.
void run_thread() {
    current->fiber.entered();
    sanitizer::acquire(&launch_begins);
    (*body)();
    if (!current->copies.empty()) {
        fail(current->copies.front().where, "copy_async16: the thread ends without having waited for this copy");
    }
    sanitizer::release(&launch_ends);
    current->finished = true;
    --unfinished;
    leave(true);
    std::abort();  // a finished thread is never resumed
}

void begin_meeting(Meeting& meeting) {
    for (void*& tag : meeting.tags) tag = new_tag();
}

void begin_thread(Thread& thread, unsigned number) {
    const dim3 size = blockDim;
    thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
    thread.warp = warps[number / kWarp].get();
    thread.lane = number % kWarp;
    thread.finished = false;
    thread.groups = 0;
    thread.fiber.start(run_thread);
    ready.add(&thread);
}

void begin_block(unsigned set, size_t shared_bytes) {
    block = &threads[set * block_threads];
    shared_memory.begin(shared_bytes);
    begin_meeting(barrier);
    for (const auto& warp : warps) begin_meeting(warp->meeting);
    unfinished = block_threads;
    ready.clear();
    for (unsigned i = 0; i < block_threads; ++i) begin_thread(*block[i], i);
    sanitizer::release(&launch_begins);
}

std::string deadlock() {
    std::map<std::string, unsigned> waiting;
    for (unsigned i = 0; i < block_threads; ++i) {
        const Thread& thread = *block[i];
        if (thread.finished) continue;
        const std::string place = std::string(thread.waits_at.file) + ":" + std::to_string(thread.waits_at.line);
        ++waiting[std::string(thread.waits_in) + " at " + place];
    }
    std::string text = "deadlock: " + std::to_string(block_threads - unfinished) + " threads have ended";
    for (const auto& [place, count] : waiting) text += ", " + std::to_string(count) + " wait in " + place;
    return text;
}

// Returns what went wrong; nothing if nothing did.
std::string run_block(unsigned set, size_t shared_bytes) {
    begin_block(set, shared_bytes);
    current = ready.take();
    threadIdx = current->index;
    host_fiber.switch_to(current->fiber, false);
    if (failure[0]) {
        sanitizer::acquire(&launch_ends);
        return failure.data();
    }
    if (unfinished) return deadlock();
    if (shared_memory.guards_are_intact()) return {};
    return "a write before or behind the " + std::to_string(shared_bytes) + " bytes of shared memory";
}

std::string run_grid(size_t shared_bytes) {
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t number = ready.shuffled ? blocks - 1 - i : i;
        blockIdx = {static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
                    static_cast<unsigned>(number / gridDim.x / gridDim.y)};
        const std::string wrong = run_block(i % fiber_sets, shared_bytes);
        if (!wrong.empty()) return wrong + " of block " + text_of(blockIdx.x, blockIdx.y, blockIdx.z);
    }
    return {};
}

// Threads that did not come to their end can't be used again.
void drop_threads() {
    for (const auto& thread : threads) thread->fiber.release(&launch_ends);
    threads.clear();
    warps.clear();
    barrier.waiting.clear();
}

void provide_threads() {
    const size_t stack_bytes = sanitizer::present() ? 256 << 10 : 64 << 10;
    while (threads.size() < fiber_sets * block_threads) threads.push_back(std::make_unique<Thread>(stack_bytes));
    while (warps.size() * kWarp < block_threads) warps.push_back(std::make_unique<Warp>());
}

}  // namespace

void set_schedule(unsigned seed) {
    const std::lock_guard<std::mutex> lock(one_launch);
    schedule = seed;
}

void fail(Source where, const char* format, ...) {
    std::array<char, 512> text;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text.data(), text.size(), format, arguments);
    va_end(arguments);
    std::snprintf(failure.data(), failure.size(), "%s:%d: %s; thread %s", where.file, where.line, text.data(),
                  text_of(threadIdx.x, threadIdx.y, threadIdx.z).c_str());
    sanitizer::release(&launch_ends);
    current->fiber.switch_to(host_fiber, true);
    std::abort();  // no one goes on with a thread that has failed
}

unsigned char* dynamic_shared() {
    return shared_memory.first();
}

unsigned lane_of_warp() {
    return current->lane;
}

void block_barrier(Source where) {
    meet(barrier, block_threads, "__syncthreads", true, where);
}

void warp_barrier(Source where) {
    meet(current->warp->meeting, kWarp, "__syncwarp", true, where);
}

const LaneData* gather(const char* operation, const LaneData& mine, Source where) {
    Warp& warp = *current->warp;
    warp.gathered[warp.meeting.round % 2][current->lane] = mine;
    const unsigned round = meet(warp.meeting, kWarp, operation, false, where);
    return warp.gathered[round % 2].data();
}

void check_shared_row(const char* operation, const void* row, Source where) {
    const ptrdiff_t offset = shared_memory.offset(row);
    if (offset < 0 || offset + 16 > static_cast<ptrdiff_t>(shared_memory.bytes())) {
        fail(where, "%s: 16 bytes at offset %td are not in the block's %zu bytes of shared memory", operation, offset,
             shared_memory.bytes());
    }
    if (offset % 16) fail(where, "%s: the shared address, at offset %td, is not a multiple of 16", operation, offset);
}

void copy_async(void* shared, const void* global, int bytes, Source where) {
    if (bytes != 0 && bytes != 16) fail(where, "copy_async16: bytes is %d, not 0 or 16", bytes);
    check_shared_row("copy_async16", shared, where);
    if (bytes && !aligned(global)) fail(where, "copy_async16: the global address %p is not a multiple of 16", global);
    if (bytes && !sanitizer::accessible(global, bytes)) {
        fail(where, "copy_async16: 16 bytes at the global address %p are out of bounds", global);
    }
    if (current->copies.size() == kMostCopies) fail(where, "copy_async16: %zu copies of a thread wait", kMostCopies);
    const Copy copy{shared, global, bytes, current->groups, where};
    if (copies_late) {
        sanitizer::copying(shared, global, sizeof(Chunk), bytes);
    } else {
        carry_out(copy);
    }
    current->copies.push_back(copy);
}

void copy_async_commit() {
    ++current->groups;
}

void copy_async_wait(unsigned groups_left) {
    std::vector<Copy>& copies = current->copies;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group + groups_left < current->groups; ++copy) {
        if (copies_late) {
            carry_out(*copy);
        } else {
            sanitizer::copying(copy->shared, copy->global, sizeof(Chunk), copy->bytes);
        }
    }
    copies.erase(copies.begin(), copy);
}

std::string run(dim3 grid, dim3 block_size, size_t shared_bytes, const std::function<void()>& kernel_call) {
    const std::lock_guard<std::mutex> lock(one_launch);
    gridDim = grid;
    blockDim = block_size;
    block_threads = block_size.x * block_size.y * block_size.z;
    body = &kernel_call;
    failure[0] = 0;
    copies_late = schedule % 2 == 1;
    ready.shuffled = schedule != 0;
    ready.random.seed(schedule);
    provide_threads();
    host_fiber.be_calling_thread();
    std::string wrong = run_grid(shared_bytes);
    if (!wrong.empty()) drop_threads();
    sanitizer::acquire(&launch_ends);
    return wrong;
}

}  // namespace rnnkern::host
