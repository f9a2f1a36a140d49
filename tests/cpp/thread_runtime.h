// The Runtime of the C++ tests: one std::thread per slot, and scratch filled with NaN patterns so
// that reads of unwritten memory show. And the CPU kernels as the shared checks call them.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"

namespace randlora {

class ThreadRuntime : public Runtime {
 public:
  explicit ThreadRuntime(int threads) : threads_(threads) {}
  ~ThreadRuntime() override {
    for (void* p : held_) std::free(p);
  }
  int threads() const override { return threads_; }
  void run(int slots, void (*task)(void*, int), void* arg) override {
    std::vector<std::thread> pool;
    for (int s = 1; s < slots; ++s) pool.emplace_back(task, arg, s);
    if (slots > 0) task(arg, 0);
    for (std::thread& t : pool) t.join();
  }
  void* scratch(size_t bytes) override {
    const size_t rounded = (bytes + 63) / 64 * 64 + 64;
    held_.push_back(std::aligned_alloc(64, rounded));
    std::memset(held_.back(), 0xff, rounded);
    return held_.back();
  }

 private:
  int threads_;
  std::vector<void*> held_;
};

// The set of kernels that RANDLORA_ISA names.
struct CpuKernels {
  static constexpr int64_t kBehind = 64;  // z, w and lambda of Hadamard bases have a vector more
  ThreadRuntime runtime;
  explicit CpuKernels(int threads) : runtime(threads) {}
  std::string settings() const { return "threads " + std::to_string(runtime.threads()); }
#define RANDLORA_CALL(name, Operator) \
  void name(const Operator& p) { cpu_kernels().name(p, runtime); }
  RANDLORA_OPERATORS(RANDLORA_CALL)
#undef RANDLORA_CALL
};

// False where the set cannot run: the test exits with 77, which CTest takes for skipped.
inline bool kernels_can_run() {
  try {
    std::printf("kernels: %s\n", cpu_kernels().isa);
    return true;
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return false;
  }
}

}  // namespace randlora
