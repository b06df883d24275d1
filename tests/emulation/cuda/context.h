// A context of execution with a stack of its own, and the switch between contexts, of which sanitizers are notified.
//
// On x86-64 a switch takes 3 ns. The fallback on other machines, ucontext, makes a system call for the signal mask each
// time, which takes 0.3 us.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Excludes the emulation's own code from ThreadSanitizer, which checks kernels only.
#define EMULATION_UNSEEN __attribute__((no_sanitize("thread")))

namespace emulation {

#if defined(__x86_64__)
// Pushes the callee-saved registers on the old stack and pops them from the new one. By the SysV convention `from` is
// in rdi, `to` in rsi.
__attribute__((naked, noinline)) EMULATION_UNSEEN inline void change_stacks(void** from, void* to) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n\t"
      "ret");
}
#endif

class Context {
 public:
  using Entry = void (*)();  // never returns

  // Makes this the context of the calling thread, with the thread's stack.
  EMULATION_UNSEEN void adopt() {
#if defined(__SANITIZE_ADDRESS__)
    // Looked up once, since the C library reads all of /proc/self/maps for it.
    static thread_local const Stack stack = own_stack();
    stack_ = stack.data, bytes_ = stack.bytes;
#endif
#if defined(__SANITIZE_THREAD__)
    fiber_ = __tsan_get_current_fiber();
#endif
  }

  // Makes the context start at `entry`. The stack is allocated once; its lowest page is inaccessible, so that an
  // overrun stops there.
  EMULATION_UNSEEN void prepare(Entry entry) {
    if (!stack_) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE));
      void* const memory =
          mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) std::abort();
      stack_ = static_cast<char*>(memory) + page;
#if defined(__SANITIZE_THREAD__)
      fiber_ = __tsan_create_fiber(0);
#endif
    }
#if defined(__x86_64__)
    // Room for six registers, then the address for `ret`; at a function's entry the stack is 8 bytes off a multiple
    // of 16.
    void** const top = reinterpret_cast<void**>(stack_ + kStackBytes);
    top[-2] = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 8;
#else
    getcontext(&registers_);
    registers_.uc_stack.ss_sp = stack_;
    registers_.uc_stack.ss_size = kStackBytes;
    makecontext(&registers_, entry, 0);
#endif
  }

  // `entry` must call this first.
  static EMULATION_UNSEEN void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

  // Switches from this context, the caller's, to another; returns after a switch back.
  EMULATION_UNSEEN void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(other.fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    change_stacks(&stack_pointer_, other.stack_pointer_);
#else
    swapcontext(&registers_, &other.registers_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  struct Stack {
    char* data;
    size_t bytes;
  };
  static Stack own_stack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* data = nullptr;
    size_t bytes = 0;
    pthread_attr_getstack(&attributes, &data, &bytes);
    pthread_attr_destroy(&attributes);
    return {static_cast<char*>(data), bytes};
  }
#endif

  static constexpr size_t kStackBytes = 256 << 10;  // a kernel takes 2 KiB of it, a sanitizer's report more

  char* stack_ = nullptr;
  size_t bytes_ = kStackBytes;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t registers_;
#endif
  void* fake_stack_ = nullptr;
  void* fiber_ = nullptr;
};

}  // namespace emulation
