// Fibers: stacks, the switch between them, and what the sanitizers must be told of both.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <deque>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// A fake stack for every fiber of every block would take ten times the time.
extern "C" __attribute__((used)) inline const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// No other thread could still find a race at exit.
extern "C" __attribute__((used)) inline const char* __tsan_default_options() {
  return "atexit_sleep_ms=0";
}
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Code that the sanitizers do not see. It must not call seen code on what it hides.
#define CUDA_ON_CPU_UNSEEN __attribute__((no_sanitize("thread"), no_sanitize("address")))

#if defined(__x86_64__)
// void cuda_on_cpu_switch(void** save, void* to): registers that a callee keeps, and the stack.
asm(R"(
.pushsection .text.cuda_on_cpu_switch,"axG",@progbits,cuda_on_cpu_switch,comdat
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
.popsection
)");
extern "C" void cuda_on_cpu_switch(void** save, void* to);
#endif

namespace cuda_on_cpu {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

#if defined(__x86_64__)
using Context = void*;  // the stack pointer
CUDA_ON_CPU_UNSEEN inline void switch_context(Context& from, Context& to) {
  cuda_on_cpu_switch(&from, to);
}
CUDA_ON_CPU_UNSEEN inline void make_context(Context& c, char* stack, void (*entry)()) {
  // From above: where `entry` would return to, `entry`, six registers; the ABI wants the stack 8
  // below a multiple of 16 on entry.
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  for (int r = 2; r <= 7; ++r) top[-r] = nullptr;
  c = top - 7;
}
#else
using Context = ucontext_t;  // slower: a system call a switch
CUDA_ON_CPU_UNSEEN inline void switch_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}
CUDA_ON_CPU_UNSEEN inline void make_context(Context& c, char* stack, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = kStack;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
#endif

struct Fiber {
  Context context;
  char* stack;
  void *fake_stack, *tsan;
};

// The host's own thread, to which every fiber returns.
struct Host {
  Context context;
  void *fake_stack, *tsan;
  const void* stack;
  size_t stack_bytes;
};
inline Host host;
#if defined(__SANITIZE_THREAD__)
inline std::deque<void*> ended;
#endif

CUDA_ON_CPU_UNSEEN inline void make_fiber(Fiber& f, char* stack, void (*entry)()) {
  f.stack = stack;
  f.fake_stack = nullptr;
  make_context(f.context, stack, entry);
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
#endif
}
// What happened before release(p) in one thread happened before what follows acquire(p) in another.
CUDA_ON_CPU_UNSEEN inline void sync_release(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
  (void)p;
}
CUDA_ON_CPU_UNSEEN inline void sync_acquire(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
  (void)p;
}

// The host is done with a fiber, be it `abandoned` where it waited; what it did is released to `end`.
CUDA_ON_CPU_UNSEEN inline void end_fiber(Fiber& f, bool abandoned, void* end) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, 1);
  __tsan_release(end);
  __tsan_switch_to_fiber(host.tsan, 1);
  ended.push_back(f.tsan);
#endif
#if defined(__SANITIZE_ADDRESS__)
  if (abandoned) __asan_unpoison_memory_region(f.stack, kStack);
#endif
  (void)f, (void)abandoned, (void)end;
}
// TSan tells at most 255 threads apart: it takes a new one for one that it saw end before. So the
// ended are kept while there is room, and a race between neighbouring blocks is seen.
CUDA_ON_CPU_UNSEEN inline void make_room(int threads) {
#if defined(__SANITIZE_THREAD__)
  for (; ended.size() + static_cast<size_t>(threads) > 254; ended.pop_front())
    __tsan_destroy_fiber(ended.front());
#endif
  (void)threads;
}

// From the host into a fiber, until that calls leave_fiber.
CUDA_ON_CPU_UNSEEN inline void run_fiber(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host.fake_stack, f.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  host.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(f.tsan, 1);  // 1: the switch itself orders nothing
#endif
  switch_context(host.context, f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
#endif
}
CUDA_ON_CPU_UNSEEN inline void enter_fiber() {  // first thing in a new fiber
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
#endif
}
CUDA_ON_CPU_UNSEEN inline void leave_fiber(Fiber& f, bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &f.fake_stack, host.stack, host.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(host.tsan, 1);
#endif
  switch_context(f.context, host.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  (void)for_ever;
}

// TSan forgets every access to memory that is mapped or allocated, and looks for no race with its
// release, while it ignores the thread that does so.
struct Ignored {
#if defined(__SANITIZE_THREAD__)
  Ignored() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Ignored() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Ignored() {}
  ~Ignored() {}
#endif
};

// Exactly `bytes` of NaN.
inline void* fresh_memory(size_t bytes) {
  Ignored ignored;
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) throw std::bad_alloc();
  return memset(p, 0xff, bytes);
}
inline void forget(void* p) {
  Ignored ignored;
  free(p);
}

// Stacks for `count` fibers, as if never touched before; stack i begins at i * kStackStride. The page
// below each catches an overflow (not under TSan, where mapping all anew is what makes it forget).
constexpr size_t kGuard = kThreadSanitizer ? 0 : 4096;
constexpr size_t kStackStride = kStack + kGuard;
inline char* fresh_stacks(int count) {
  static char* pool = nullptr;
  static int mapped = 0;
  if (count > mapped || kThreadSanitizer) {
    Ignored ignored;
    if (pool) munmap(pool, mapped * kStackStride);
    pool = static_cast<char*>(mmap(nullptr, count * kStackStride, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (pool == MAP_FAILED) throw std::bad_alloc();
    mapped = count;
    for (int i = 0; kGuard && i < count; ++i) mprotect(pool + i * kStackStride, kGuard, PROT_NONE);
  }
  return pool + kGuard;
}

}  // namespace cuda_on_cpu
