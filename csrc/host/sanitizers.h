// What the emulator tells ThreadSanitizer and AddressSanitizer, if the process runs under one of them: their functions
// are weak symbols, absent otherwise. What uses this header is itself compiled without sanitizers.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#define RNNKERN_WEAK __attribute__((weak))
extern "C" {
RNNKERN_WEAK void* __tsan_get_current_fiber();
RNNKERN_WEAK void* __tsan_create_fiber(unsigned flags);
RNNKERN_WEAK void __tsan_destroy_fiber(void* fiber);
RNNKERN_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
RNNKERN_WEAK void __tsan_acquire(void* tag);
RNNKERN_WEAK void __tsan_release(void* tag);
RNNKERN_WEAK void __tsan_read_range(void* from, unsigned long bytes);
RNNKERN_WEAK void __tsan_write_range(void* from, unsigned long bytes);
RNNKERN_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
RNNKERN_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_bytes);
RNNKERN_WEAK void* __asan_region_is_poisoned(void* from, size_t bytes);
RNNKERN_WEAK void __asan_poison_memory_region(const volatile void* from, size_t bytes);
RNNKERN_WEAK void __asan_unpoison_memory_region(const volatile void* from, size_t bytes);
}
#undef RNNKERN_WEAK

namespace rnnkern::host::sanitizer {

constexpr unsigned kWithoutOrder = 1;  // a switch of fibers does not order what they do

inline bool watches_order() {
    return __tsan_create_fiber;
}

inline bool present() {
    return watches_order() || __asan_poison_memory_region;
}

// What was done before a release happened before what is done after an acquire of the same tag.
inline void release(void* tag) {
    if (__tsan_release) __tsan_release(tag);
}

inline void acquire(void* tag) {
    if (__tsan_acquire) __tsan_acquire(tag);
}

// A copy that may happen at any time from here on, or has at any time up to here.
inline void copying(void* to, const void* from, size_t written, size_t read) {
    if (!__tsan_write_range) return;
    if (read) __tsan_read_range(const_cast<void*>(from), read);
    __tsan_write_range(to, written);
}

inline bool accessible(const void* from, size_t bytes) {
    return !__asan_region_is_poisoned || !__asan_region_is_poisoned(const_cast<void*>(from), bytes);
}

inline void forbid(const void* from, size_t bytes) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(from, bytes);
}

inline void allow(const void* from, size_t bytes) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(from, bytes);
}

// Lets ThreadSanitizer forget who accessed these pages: mapped anew they count as written by the caller, just now.
inline void forget(void* pages, size_t bytes) {
    if (watches_order()) {
        mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    }
}

}  // namespace rnnkern::host::sanitizer
