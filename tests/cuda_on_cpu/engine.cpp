// Runs a grid on the CPU, one block after another. In a block one thread runs at a time, until it
// waits for others. The sanitizers do not see the scheduler (CUDA_ON_CPU_UNSEEN). We tell TSan only
// what CUDA's barriers order, and that a launch comes after what the host did before it and before
// what the host does next. Blocks and shuffles order nothing.
#include "engine.h"

#include <dlfcn.h>

#include <fstream>
#include <mutex>
#include <set>

#include "fiber.h"
#include "schedule.h"

namespace cuda_on_cpu {

// ---- the state of the running block -------------------------------------------------------------

std::string text(const Site& s) {
  return std::string(s.what) + " at " + s.file + ":" + std::to_string(s.line);
}

struct Thread {
  enum State { ready, waiting, done } state;
  int id;
  Site site;  // where it waits
  Fiber* fiber;
  // cp.async: a ring of copies issued but not delivered, and the number of groups committed
  struct Copy {
    void* to;
    uint64_t data[2];
    int group;
  };
  static constexpr int kCopies = 256;
  Copy copy[kCopies];
  int first_copy, end_copy, groups;
};

// A barrier, or a collective of a warp, that some threads have reached.
struct Meeting {
  int arrived, parity;
  Site site;
};

struct Warp {
  Meeting meeting;
  unsigned mask, waiting, exited;
  void* operand[32];
};

// TSan orders by address, in units of 8 bytes; every block gets new ones. Each meeting alternates
// between two: a thread that has yet to leave one meeting must not see what precedes the next.
struct SyncPoints {
  uint64_t barrier[2], warp[32][2];
};

constexpr int kMaxThreads = 1024;
struct Block {
  const char* kernel;
  void (*body)(const void*);
  const void* argument;
  int threads, exited;
  Meeting meeting;
  unsigned char* shared;
  size_t shared_bytes;
  SyncPoints* sync;
  std::string error;
  Thread* current;
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / 32];
};
Block block;

[[noreturn]] void fail(const std::string& what) {
  const auto number = [](unsigned v) { return std::to_string(v); };
  throw Error(std::string("kernel ") + block.kernel + ", block (" + number(blockIdx.x) + ", " +
              number(blockIdx.y) + ", " + number(blockIdx.z) + "), thread " + number(threadIdx.x) +
              ": " + what);
}
unsigned char* shared() { return block.shared; }
size_t shared_bytes() { return block.shared_bytes; }

void require(bool holds, const Site& site, const char* what) {
  if (!holds) fail(text(site) + ": " + what);
}

// ---- waiting ------------------------------------------------------------------------------------

// True for the last of `expected` threads.
CUDA_ON_CPU_UNSEEN bool arrive(Meeting& m, const Site& site, int expected) {
  if (m.arrived == 0) m.site = site;
  const auto differ = [](const char* a, const char* b) { return a != b && strcmp(a, b); };
  if (m.site.line != site.line || differ(m.site.what, site.what) || differ(m.site.file, site.file))
    fail(text(site) + " is divergent: others wait for " + text(m.site));
  if (++m.arrived < expected) return false;
  m.arrived = 0;
  m.parity ^= 1;
  return true;
}

// Returns to the scheduler until another thread makes this one ready.
CUDA_ON_CPU_UNSEEN void wait_at(const Site& site) {
  Thread& t = *block.current;
  t.state = Thread::waiting;
  t.site = site;
  leave_fiber(*t.fiber);
}

CUDA_ON_CPU_UNSEEN void barrier(Site site) {
  Block& b = block;
  if (b.exited) fail(text(site) + ": " + std::to_string(b.exited) + " threads have exited");
  void* sync = &b.sync->barrier[b.meeting.parity];
  sync_release(sync);
  if (arrive(b.meeting, site, b.threads))
    for (int t = 0; t < b.threads; ++t) b.thread[t].state = Thread::ready;
  else
    wait_at(site);
  sync_acquire(sync);
}

CUDA_ON_CPU_UNSEEN void collective(Site site, unsigned mask, void* operand, Compute compute,
                                   bool orders_memory) {
  const int id = block.current->id, l = id % 32;
  Warp& w = block.warp[id / 32];
  if (!(mask >> l & 1)) fail(text(site) + ": the mask lacks the calling lane");
  if (mask & w.exited) fail(text(site) + ": the mask names lanes that have exited");
  if (w.waiting && w.mask != mask) fail(text(site) + ": lanes give different masks");
  w.mask = mask;
  w.waiting |= 1u << l;
  w.operand[l] = operand;
  void* sync = &block.sync->warp[id / 32][w.meeting.parity];
  if (orders_memory) sync_release(sync);
  if (arrive(w.meeting, site, __builtin_popcount(mask))) {
    if (compute) compute(w.operand, mask);
    w.waiting = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) block.thread[id / 32 * 32 + i].state = Thread::ready;
  } else {
    wait_at(site);
  }
  if (orders_memory) sync_acquire(sync);
}

// ---- what threads exchange ----------------------------------------------------------------------

struct Shuffle {
  uint64_t in, out;
  int source;
};
CUDA_ON_CPU_UNSEEN static void shuffle_lanes(void* const* lane, unsigned mask) {
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Shuffle* s = static_cast<Shuffle*>(lane[l]);
    const bool defined = mask >> s->source & 1;  // lanes outside the mask give no value
    s->out = defined ? static_cast<Shuffle*>(lane[s->source])->in : ~uint64_t{0};
  }
}

uint64_t shuffle(Site site, unsigned mask, uint64_t value, int source) {
  Shuffle s{value, 0, source >= 0 && source < 32 ? source : lane()};
  collective(site, mask, &s, shuffle_lanes);
  return s.out;
}

struct Vote {
  bool yes;
  unsigned ballot;
};
CUDA_ON_CPU_UNSEEN static void count_votes(void* const* lane, unsigned mask) {
  unsigned ballot = 0;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && static_cast<Vote*>(lane[l])->yes) ballot |= 1u << l;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) static_cast<Vote*>(lane[l])->ballot = ballot;
}
unsigned vote(Site site, unsigned mask, bool yes) {
  Vote v{yes, 0};
  collective(site, mask, &v, count_votes);
  return v.ballot;
}

CUDA_ON_CPU_UNSEEN bool push_copy(void* to, const uint64_t* data) {
  auto& t = *block.current;
  if (t.end_copy - t.first_copy == t.kCopies) return false;
  auto& c = t.copy[t.end_copy++ % t.kCopies];
  c.to = to, c.data[0] = data[0], c.data[1] = data[1], c.group = t.groups;
  return true;
}
CUDA_ON_CPU_UNSEEN bool pop_copy(int pending, void** to, uint64_t* data) {
  auto& t = *block.current;
  if (t.end_copy == t.first_copy) return false;
  auto& c = t.copy[t.first_copy % t.kCopies];
  if (c.group >= t.groups - pending) return false;
  ++t.first_copy;
  *to = c.to, data[0] = c.data[0], data[1] = c.data[1];
  return true;
}
CUDA_ON_CPU_UNSEEN void commit_copies() { ++block.current->groups; }

// ---- running ------------------------------------------------------------------------------------

CUDA_ON_CPU_UNSEEN void run_thread() {
  sync_acquire(&host.began);
  sync_release(&host.ended);  // else TSan of gcc 12 has no stack for code before a barrier
  Block& b = block;
  Thread& t = *b.current;
  try {
    b.body(b.argument);
    Warp& w = b.warp[t.id / 32];
    w.exited |= 1u << t.id % 32;
    ++b.exited;
    if (b.meeting.arrived) fail("exits while others wait for " + text(b.meeting.site));
    if (w.waiting && (w.mask & w.exited))
      fail("exits while other lanes wait for " + text(w.meeting.site));
  } catch (const std::exception& e) {
    b.error = e.what();
  }
  t.state = Thread::done;
  leave_fiber(*t.fiber);
}
CUDA_ON_CPU_UNSEEN void threads_main() {
  for (arrive_in_fiber(*block.current->fiber);;) run_thread();
}

CUDA_ON_CPU_UNSEEN void run_block(const int64_t* order) {
  Block& b = block;
  static int64_t number = 0;
  ++number;
  b.exited = 0;
  b.meeting = {};
  for (int w = 0; w < b.threads / 32; ++w) b.warp[w] = {};
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    t.state = Thread::ready, t.id = i;
    t.first_copy = t.end_copy = t.groups = 0;
    t.fiber = &start_fiber(i, number, threads_main);
  }
  for (bool any = true; any && b.error.empty();) {
    any = false;
    for (int i = 0; i < b.threads && b.error.empty(); ++i) {
      Thread& t = b.thread[order[i]];
      if (t.state != Thread::ready) continue;
      any = true;
      b.current = &t;
      threadIdx.x = static_cast<unsigned>(t.id);
      run_fiber(*t.fiber);
    }
  }
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    if (t.state == Thread::waiting && b.error.empty()) {
      threadIdx.x = static_cast<unsigned>(i);
      try {
        fail("waits for ever for " + text(t.site));
      } catch (const Error& e) {
        b.error = e.what();
      }
    }
    end_fiber(*t.fiber, t.state != Thread::done);
  }
}

CUDA_ON_CPU_UNSEEN void run_grid(const char* kernel, dim3 grid, int threads, int64_t shared_bytes,
                                 int64_t shared_limit, void (*body)(const void*),
                                 const void* argument) {
  const auto need = [&](bool holds, const char* what) {
    if (!holds) throw Error(std::string("launch of ") + kernel + ": " + what);
  };
  need(threads > 0 && threads % 32 == 0 && threads <= kMaxThreads, "block size");
  need(!kThreadSanitizer || threads <= 128, "ThreadSanitizer misses races in blocks over 128");
  need(grid.x > 0 && grid.y > 0 && grid.z > 0, "empty grid");
  need(grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16, "grid size");
  need(shared_bytes >= 0 && shared_bytes <= shared_limit, "shared memory");
  static std::mutex one_launch_at_a_time;  // Python's autograd uses its own thread
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Block& b = block;
  b.kernel = kernel, b.body = body, b.argument = argument, b.threads = threads;
  b.shared_bytes = static_cast<size_t>(shared_bytes);
  b.error.clear();
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  sync_release(&host.began);
  const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
  for (int64_t i : schedule.permutation(blocks, 0)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    b.shared = static_cast<unsigned char*>(fresh_memory(b.shared_bytes));
    b.sync = static_cast<SyncPoints*>(fresh_memory(sizeof(SyncPoints)));
    run_block(schedule.permutation(threads, static_cast<uint64_t>(i) + 1).data());
    forget(b.shared), forget(b.sync);
    if (!b.error.empty()) break;
  }
  sync_acquire(&host.ended);
  if (!b.error.empty()) throw Error(b.error);
}

// ---- records ------------------------------------------------------------------------------------

void note_start(const void* kernel) {
  static const char* name = getenv("CUDA_ON_CPU_KERNELS");
  static std::ofstream file(name ? name : "/dev/null");
  static std::set<const void*> seen;
  Dl_info where;
  if (!name || !seen.insert(kernel).second || !dladdr(kernel, &where)) return;
  file << where.dli_fname << ' '
       << static_cast<const char*>(kernel) - static_cast<const char*>(where.dli_fbase) << std::endl;
}
void note_launch(const char* kernel, unsigned blocks) {
  if (const char* name = getenv("CUDA_ON_CPU_LAUNCHES"))
    std::ofstream(name, std::ios::app) << kernel << ' ' << blocks << std::endl;
}

}  // namespace cuda_on_cpu
