// Switching between the stacks of emulated threads, and what ThreadSanitizer and AddressSanitizer must hear of it.
// ThreadSanitizer sees every CUDA thread as a thread of its own, and as ordered only what a barrier orders: a missing
// barrier is reported in whatever order the threads happen to run. The emulator itself is compiled without
// ThreadSanitizer, since its own bookkeeping is no access of a kernel, and with EMULATED_UNDER_THREAD_SANITIZER.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>

#if defined(EMULATED_UNDER_THREAD_SANITIZER)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#elif defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
}
#endif

namespace emulator {

struct Context {
  ucontext_t state;
  jmp_buf resume;
  bool started = false;
  void* sanitizer = nullptr;     // ThreadSanitizer's name of this thread, or AddressSanitizer's saved stack
  const void* bottom = nullptr;  // of the stack
  size_t size = 0;
};

inline void make_context(Context& context, char* stack, size_t size, void (*main)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack, context.state.uc_stack.ss_size = size;
  makecontext(&context.state, main, 0);
  context.bottom = stack, context.size = size;
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  context.sanitizer = __tsan_create_fiber(0);
#endif
}

// At the start of a context's function, which no return of switch_context leads to.
inline void arrive_from([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
}

inline void switch_context(Context& from, Context& to) {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  if (from.sanitizer == nullptr) from.sanitizer = __tsan_get_current_fiber();  // the scheduler
  constexpr unsigned kOrdersNothing = 1;
  __tsan_switch_to_fiber(to.sanitizer, kOrdersNothing);
  swapcontext(&from.state, &to.state);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.bottom, to.size);
  swapcontext(&from.state, &to.state);
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#else
  // Cheaper than swapcontext, which asks the kernel for the signal mask.
  if (_setjmp(from.resume) != 0) return;
  if (to.started) _longjmp(to.resume, 1);
  from.started = to.started = true;
  setcontext(&to.state);
#endif
}

// What this thread did before `event` is visible to those that wait for it.
inline void happens_before([[maybe_unused]] char* event) {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  __tsan_release(event);
#endif
}

inline void happens_after([[maybe_unused]] char* event) {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  __tsan_acquire(event);
#endif
}

// The scheduler's looks at the threads' stacks are not the kernels' business.
inline void begin_scheduling() {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

inline void end_scheduling() {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

// Accesses of the emulator in the name of the current thread.
inline void reads([[maybe_unused]] const void* address, [[maybe_unused]] size_t size) {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  __tsan_read_range(const_cast<void*>(address), size);
#endif
}

inline void writes([[maybe_unused]] void* address, [[maybe_unused]] size_t size) {
#if defined(EMULATED_UNDER_THREAD_SANITIZER)
  __tsan_write_range(address, size);
#endif
}

}  // namespace emulator
