// The Runtime of the C++ tests: one std::thread per slot, and scratch filled with NaN patterns so
// that reads of unwritten memory show.
#pragma once
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "core/runtime.h"

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

}  // namespace randlora
