// Call stacks, and the switch from one to another.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#include "sanitizers.h"

#if defined(__x86_64__)
// What a function has to keep goes onto the stack that is left, and comes from the one that is entered.
asm(R"(
    .text
    .type rnnkern_switch_stack, @function
rnnkern_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size rnnkern_switch_stack, . - rnnkern_switch_stack
)");
extern "C" void rnnkern_switch_stack(void** left, void* entered);
#else
#include <ucontext.h>
#endif

namespace rnnkern::host {

#if defined(__x86_64__)
class Stack {
  public:
    void start(unsigned char* memory, size_t bytes, void (*entry)()) {
        void** top = reinterpret_cast<void**>(memory + bytes);
        *--top = nullptr;  // aligns the entry's frame, as a return address would
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that the switch takes from here
        top_ = top;
    }
    void switch_to(Stack& next) { rnnkern_switch_stack(&top_, next.top_); }

  private:
    void* top_ = nullptr;
};
#else
class Stack {  // the way of POSIX, some twenty times slower
  public:
    void start(unsigned char* memory, size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = memory;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void switch_to(Stack& next) { swapcontext(&context_, &next.context_); }

  private:
    ucontext_t context_;
};
#endif

// A call stack as the sanitizers know it too.
class Fiber {
  public:
    // The stack of who runs already.
    Fiber() = default;

    // A stack of its own, for start(). The page below it, which no one may touch, ends an overflow.
    explicit Fiber(size_t bytes) : bytes_(bytes) {
        void* memory = mmap(nullptr, kPage + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, kPage, PROT_NONE);
        memory_ = static_cast<unsigned char*>(memory) + kPage;
        bottom_ = memory_;
        if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0);
    }

    ~Fiber() {
        if (!memory_) return;
        sanitizer::allow(memory_, bytes_);  // what is mapped here next must not meet the frames of an unfinished call
        if (tsan_) __tsan_destroy_fiber(tsan_);
        munmap(memory_ - kPage, kPage + bytes_);
    }

    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next switch here calls `entry`, which must begin with entered(), and never return.
    void start(void (*entry)()) {
        fake_stack_ = nullptr;
        stack_.start(memory_, bytes_, entry);
    }

    // For the stack of who runs already: which thread that is.
    void be_calling_thread() {
        if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
    }

    // From this fiber, which runs, to another; returns when someone switches back. `for_good`: no one will.
    void switch_to(Fiber& next, bool for_good) {
        next.previous_ = this;
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan_, sanitizer::kWithoutOrder);
        if (__sanitizer_start_switch_fiber) {
            __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, next.bottom_, next.bytes_);
        }
        stack_.switch_to(next.stack_);
        entered();
    }

    // AddressSanitizer tells at each switch which stack was left: the only way to learn where a foreign one lies.
    void entered() {
        if (__sanitizer_finish_switch_fiber) {
            __sanitizer_finish_switch_fiber(fake_stack_, &previous_->bottom_, &previous_->bytes_);
        }
    }

    // A release by this fiber, which does not run.
    void release(void* tag) {
        if (!__tsan_switch_to_fiber) return;
        void* running = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(tsan_, sanitizer::kWithoutOrder);
        __tsan_release(tag);
        __tsan_switch_to_fiber(running, sanitizer::kWithoutOrder);
    }

  private:
    static constexpr size_t kPage = 4096;

    Stack stack_;
    unsigned char* memory_ = nullptr;  // null: not ours
    const void* bottom_ = nullptr;
    size_t bytes_ = 0;
    Fiber* previous_ = nullptr;
    void* fake_stack_ = nullptr;  // AddressSanitizer's
    void* tsan_ = nullptr;        // ThreadSanitizer's
};

}  // namespace rnnkern::host
