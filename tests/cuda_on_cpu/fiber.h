// Fibers: stacks, switching between them, and what the sanitizers must know of both. A part of
// engine.cpp, which alone includes it.
#pragma once
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

#include "engine.h"

// Fake stacks for the fibers of every block would make runs ten times slower.
extern "C" __attribute__((used, visibility("default"))) inline const char*
__asan_default_options() {
  return "detect_stack_use_after_return=0";
}
// At exit, no other thread can still find a race.
extern "C" __attribute__((used, visibility("default"))) inline const char*
__tsan_default_options() {
  return "atexit_sleep_ms=0";
}
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);

namespace cuda_on_cpu {

constexpr size_t kStack = (kSanitized ? 256 : 64) << 10;

struct Context {
  // Of __builtin_setjmp, which the sanitizers do not intercept, and which makes no system call.
  void* at[5];
  ucontext_t start;
  bool starts = false;  // at `start` and not at `at`
};
CUDA_ON_CPU_UNSEEN void switch_context(Context& from, Context& to) {
  if (__builtin_setjmp(from.at)) return;
  if (!to.starts) __builtin_longjmp(to.at, 1);
  to.starts = false;
  setcontext(&to.start);
}
CUDA_ON_CPU_UNSEEN void make_context(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.start);
  c.start.uc_stack.ss_sp = stack, c.start.uc_stack.ss_size = kStack;
  makecontext(&c.start, entry, 0);
  c.starts = true;
}

// The host's thread; every fiber returns to it.
struct Host {
  Context context;
  void *fake_stack, *tsan;
  const void* stack;
  size_t stack_bytes;
  uint64_t began, ended;  // of a launch: sync points
};
inline Host host;

// Tells TSan that all before release(p) in one thread precedes all after acquire(p) in another.
CUDA_ON_CPU_UNSEEN void sync_release(void* p) {
  if constexpr (kThreadSanitizer) __tsan_release(p);
}
CUDA_ON_CPU_UNSEEN void sync_acquire(void* p) {
  if constexpr (kThreadSanitizer) __tsan_acquire(p);
}

struct Fiber {
  Context context;
  char* stack = nullptr;
  void *fake_stack, *tsan = nullptr;
  int64_t block = -1;  // the last block that it was in; kSpoilt: not to be used again as it is
};
constexpr int64_t kSpoilt = -2;

// A fiber for thread number `thread` of block number `block`, blocks counted through all launches.
// `entry` runs one thread after another, and leaves the fiber after each.
// To TSan a fiber is one thread: its work in one block precedes its work in the next. Through the
// barriers, so does the work of all other threads, which would hide races between the two blocks.
// So neighbouring blocks need different fibers, but TSan can tell only 255 threads apart. Fibers
// therefore take turns, and one whose turn comes again in the very next block is created anew.
constexpr int kFibers = kThreadSanitizer ? 254 : 1024;
CUDA_ON_CPU_UNSEEN Fiber& start_fiber(int thread, int64_t block, void (*entry)()) {
  static Fiber pool[kFibers];
  static int turn = 0;
  Fiber& f = pool[kThreadSanitizer ? turn++ % kFibers : thread];
  constexpr size_t guard = 4096;  // below the stack: an overflow ends there
  if (f.block == kSpoilt || (kThreadSanitizer && f.block == block - 1 && f.stack)) {
    munmap(f.stack - guard, guard + kStack);
    f.stack = nullptr;
  }
  if (!f.stack) {
    void* p = mmap(nullptr, guard + kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, guard, PROT_NONE);
    f.stack = static_cast<char*>(p) + guard;
    f.fake_stack = nullptr;
    make_context(f.context, f.stack, entry);
    if constexpr (kThreadSanitizer) {
      if (f.tsan) __tsan_destroy_fiber(f.tsan);
      f.tsan = __tsan_create_fiber(0);
    }
  }
  f.block = block;
  return f;
}

// Called when the host is done with a fiber; `abandoned` if it still waits for something.
CUDA_ON_CPU_UNSEEN void end_fiber(Fiber& f, bool abandoned) {
  if constexpr (kAddressSanitizer)
    if (abandoned) __asan_unpoison_memory_region(f.stack, kStack);
  if constexpr (kThreadSanitizer) {
    __tsan_switch_to_fiber(f.tsan, 1);  // 1: the switch itself orders nothing
    __tsan_release(&host.ended);
    __tsan_switch_to_fiber(host.tsan, 1);
  }
  if (abandoned) f.block = kSpoilt;
}

// Runs a fiber from the host until it calls leave_fiber.
CUDA_ON_CPU_UNSEEN void run_fiber(Fiber& f) {
  if constexpr (kAddressSanitizer)
    __sanitizer_start_switch_fiber(&host.fake_stack, f.stack, kStack);
  if constexpr (kThreadSanitizer) {
    host.tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f.tsan, 1);
  }
  switch_context(host.context, f.context);
  if constexpr (kAddressSanitizer)
    __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
}
CUDA_ON_CPU_UNSEEN void arrive_in_fiber(Fiber& f) {  // first thing in a fiber
  if constexpr (kAddressSanitizer)
    __sanitizer_finish_switch_fiber(f.fake_stack, &host.stack, &host.stack_bytes);
}
CUDA_ON_CPU_UNSEEN void leave_fiber(Fiber& f) {
  if constexpr (kAddressSanitizer)
    __sanitizer_start_switch_fiber(&f.fake_stack, host.stack, host.stack_bytes);
  if constexpr (kThreadSanitizer) __tsan_switch_to_fiber(host.tsan, 1);
  switch_context(f.context, host.context);
  arrive_in_fiber(f);
}

// Makes TSan ignore the thread. TSan then forgets earlier accesses to memory that the thread
// allocates, and looks for no race when the thread frees memory.
struct Ignored {
  Ignored() {
    if constexpr (kThreadSanitizer)
      AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
  }
  ~Ignored() {
    if constexpr (kThreadSanitizer) AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0);
  }
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

}  // namespace cuda_on_cpu
