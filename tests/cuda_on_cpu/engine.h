// Runs the threads of a grid as fibers: blocks one after another, in each block one thread at a time
// until it waits for others. The scheduler stays out of the sanitizers' sight (UNSEEN), and tells
// them of fibers, of what barriers order, and of nothing more.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// The scheduler sets them whenever it switches.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a thread waits for, and where in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
};
CUDA_ON_CPU_UNSEEN inline bool same(const Site& a, const Site& b) {
  return a.line == b.line && strcmp(a.what, b.what) == 0 && strcmp(a.file, b.file) == 0;
}
inline std::string text(const Site& s) {
  return std::string(s.what) + " at " + s.file + ":" + std::to_string(s.line);
}

// ---- schedules -----------------------------------------------------------------------------------

struct Schedule {
  enum Order { forward, reverse, random } order = forward;
  unsigned seed = 0;

  static Schedule of_environment() {
    const char* text = getenv("CUDA_ON_CPU_SCHEDULE");
    if (!text || !strcmp(text, "forward")) return {};
    if (!strcmp(text, "reverse")) return {reverse, 0};
    if (!strncmp(text, "random:", 7)) return {random, static_cast<unsigned>(atoi(text + 7))};
    throw Error(std::string("CUDA_ON_CPU_SCHEDULE is forward, reverse or random:SEED, not ") +
                text);
  }
  std::vector<int64_t> permutation(int64_t count, uint64_t salt) const {
    std::vector<int64_t> p(count);
    std::iota(p.begin(), p.end(), 0);
    if (order == reverse) std::reverse(p.begin(), p.end());
    if (order == random) std::shuffle(p.begin(), p.end(), std::mt19937_64(seed * 77777u + salt));
    return p;
  }
};
inline Schedule schedule = Schedule::of_environment();

// ---- the state of a block ------------------------------------------------------------------------

struct Thread {
  enum State { ready, waits, done } state;
  int id;
  Site site;  // where it waits
  Fiber fiber;
  // cp.async: copies issued and not yet delivered, in order
  struct Copy {
    void* to;
    uint64_t data[2];
    int group;
  };
  static constexpr int kCopies = 256;
  Copy copies[kCopies];
  int first_copy, end_copy, groups;  // a ring: copies [first, end); groups committed so far
};

struct Warp {
  unsigned arrived, mask, exited;
  Site site;
  void* operand[32];
  int parity;
  char sync[2];
};

constexpr int kMaxThreads = 1024;
struct Block {
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  int threads = 0, arrived = 0, exited = 0, parity = 0;
  Site site = {};
  char sync[2], grid_end;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::string error;
  Thread* current = nullptr;
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / 32];
};
inline Block block;

inline unsigned char* shared() { return block.shared; }
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

[[noreturn]] inline void fail(const std::string& what) {
  const auto number = [](unsigned v) { return std::to_string(v); };
  throw Error(std::string("kernel ") + block.kernel + ", block (" + number(blockIdx.x) + ", " +
              number(blockIdx.y) + ", " + number(blockIdx.z) + "), thread " + number(threadIdx.x) +
              ": " + what);
}
inline void require(bool holds, const Site& site, const char* what) {
  if (!holds) fail(text(site) + ": " + what);
}

// ---- waiting -------------------------------------------------------------------------------------

// The running thread hands over to the scheduler until someone makes it ready again.
CUDA_ON_CPU_UNSEEN inline void wait_at(const Site& site) {
  Thread& t = *block.current;
  t.state = Thread::waits;
  t.site = site;
  leave_fiber(t.fiber, false);
}

CUDA_ON_CPU_UNSEEN inline void barrier(Site site) {
  Block& b = block;
  if (b.exited) fail(text(site) + ": " + std::to_string(b.exited) + " threads have exited");
  if (b.arrived == 0) b.site = site;
  if (!same(b.site, site))
    fail(text(site) + ": divergent barrier, others wait for " + text(b.site));
  char* sync = &b.sync[b.parity];
  sync_release(sync);
  if (++b.arrived < b.threads) {
    wait_at(site);
  } else {
    b.arrived = 0;
    b.parity ^= 1;
    for (int t = 0; t < b.threads; ++t) b.thread[t].state = Thread::ready;
  }
  sync_acquire(sync);
}

// All lanes of the mask meet; the last to arrive computes for all from their operands. Only
// __syncwarp orders memory.
using Compute = void (*)(void* const* operand, unsigned mask);
CUDA_ON_CPU_UNSEEN inline void collective(Site site, unsigned mask, void* operand, Compute compute,
                                          bool orders_memory = false) {
  const int id = block.current->id, l = id % 32;
  Warp& w = block.warp[id / 32];
  if (!(mask >> l & 1)) fail(text(site) + ": the mask lacks the calling lane");
  if (mask & w.exited) fail(text(site) + ": the mask names lanes that have exited");
  if (!w.arrived) w.mask = mask, w.site = site;
  if (!same(w.site, site)) fail(text(site) + ": divergent, other lanes wait for " + text(w.site));
  if (w.mask != mask) fail(text(site) + ": lanes give different masks");
  w.operand[l] = operand;
  w.arrived |= 1u << l;
  char* sync = &w.sync[w.parity];
  if (orders_memory) sync_release(sync);
  if (w.arrived != mask) {
    wait_at(site);
  } else {
    if (compute) compute(w.operand, mask);
    w.arrived = 0;
    w.parity ^= 1;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) block.thread[id / 32 * 32 + i].state = Thread::ready;
  }
  if (orders_memory) sync_acquire(sync);
}

// ---- running -------------------------------------------------------------------------------------

CUDA_ON_CPU_UNSEEN inline void thread_main() {
  enter_fiber();
  Block& b = block;
  Thread& t = *b.current;
  try {
    (*b.body)();
    Warp& w = b.warp[t.id / 32];
    if (w.arrived & w.mask)
      if (w.mask >> t.id % 32 & 1) fail("exits, but other lanes wait for " + text(w.site));
    w.exited |= 1u << t.id % 32;
    ++b.exited;
    if (b.arrived) fail("exits, but other threads wait for " + text(b.site));
  } catch (const std::exception& e) {
    b.error = e.what();
  }
  t.state = Thread::done;
  sync_release(&b.grid_end);
  leave_fiber(t.fiber, true);
  abort();
}

CUDA_ON_CPU_UNSEEN inline void run_block(const std::vector<int64_t>& order) {
  Block& b = block;
  char* stacks = fresh_stacks(b.threads);
  b.arrived = b.exited = b.parity = 0;
  for (int w = 0; w < b.threads / 32; ++w) b.warp[w] = Warp();
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    t.state = Thread::ready, t.id = i;
    t.first_copy = t.end_copy = t.groups = 0;
    make_fiber(t.fiber, stacks + i * kStackStride, thread_main);
  }
  const int64_t* thread_of = order.data();
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < b.threads; ++i) {
      Thread& t = b.thread[thread_of[i]];
      if (t.state != Thread::ready) continue;
      any = true;
      b.current = &t;
      threadIdx = {static_cast<unsigned>(t.id), 0, 0};
      run_fiber(t.fiber);
      if (!b.error.empty()) return;
    }
  }
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    if (t.state != Thread::waits) continue;
    threadIdx.x = static_cast<unsigned>(i);
    try {
      fail("waits for ever for " + text(t.site));
    } catch (const Error& e) {
      b.error = e.what();
      return;
    }
  }
}

CUDA_ON_CPU_UNSEEN inline void run(const char* name, dim3 grid, int threads, size_t shared_bytes,
                                   const std::function<void()>& body) {
  Block& b = block;
  b.kernel = name;
  const auto need = [&](bool holds, const char* what) {
    if (!holds) throw Error(std::string("launch of ") + name + ": " + what);
  };
  need(threads > 0 && threads % 32 == 0 && threads <= kMaxThreads, "block size");
  need(grid.x > 0 && grid.y > 0 && grid.z > 0, "empty grid");
  need(grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16, "grid size");
  need(shared_bytes <= 227 << 10, "shared memory");
  need(!kThreadSanitizer || threads <= 128, "ThreadSanitizer misses races of over 128 threads");
  b.body = &body, b.threads = threads, b.shared_bytes = shared_bytes;
  b.error.clear();
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
  for (int64_t i : schedule.permutation(blocks, 0)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    b.shared = fresh_memory(b.shared, shared_bytes);
    run_block(schedule.permutation(threads, static_cast<uint64_t>(i) + 1));
    for (int t = 0; t < threads; ++t) free_fiber(b.thread[t].fiber, !b.error.empty());
    if (!b.error.empty()) break;
  }
  sync_acquire(&b.grid_end);
  if (!b.error.empty()) throw Error(b.error);
}

// Runs `body`, which returns a vector, under every order of blocks and threads: same bits?
template <class F>
bool same_bits_under_all_schedules(const F& body) {
  const Schedule before = schedule;
  schedule = {Schedule::forward, 0};
  const auto want = body();
  bool same = true;
  for (Schedule s : {Schedule{Schedule::reverse, 0}, Schedule{Schedule::random, 1},
                     Schedule{Schedule::random, 2}}) {
    schedule = s;
    const auto got = body();
    same &= got.size() == want.size() &&
            memcmp(got.data(), want.data(), want.size() * sizeof(want[0])) == 0;
  }
  schedule = before;
  return same;
}

}  // namespace cuda_on_cpu
