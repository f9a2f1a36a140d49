// What the tests of the CUDA kernels need: a Device on the CPU, which also calls the kernels, and a
// main() that runs a test under every schedule, with results equal to the last bit.
#pragma once
#include <string>

#include "arrays.h"
#include "core/device.h"
#include "cuda/kernels.h"
#include "cuda_on_cpu.h"
#include "schedule.h"

namespace randlora {

// Host pointers serve as device pointers.
class TestDevice : public Device {
 public:
  static constexpr int64_t kBehind = 0;  // CUDA kernels read no element that is not there
  // ThreadSanitizer takes blocks of 128.
  explicit TestDevice(int threads = 128, int64_t shared = 227 << 10, int multiprocessors_ = 3) {
    max_threads = threads, shared_bytes = shared, multiprocessors = multiprocessors_;
  }
  void* scratch(size_t bytes) override {
    held_.emplace_back(new Poisoned(static_cast<int64_t>(bytes)));
    return held_.back()->get();
  }
  std::string settings() const {
    return "threads " + std::to_string(max_threads) + " shared " + std::to_string(shared_bytes) +
           " multiprocessors " + std::to_string(multiprocessors);
  }
#define RANDLORA_CALL(name, Operator) \
  void name(const Operator& p) { cuda::name(p, *this); }
  RANDLORA_OPERATORS(RANDLORA_CALL)
#undef RANDLORA_CALL

 private:
  std::vector<std::unique_ptr<Poisoned>> held_;
};

// The same results in whatever order blocks and threads run.
template <class F>
void under_all_schedules(const F& tests) {
  using cuda_on_cpu::Schedule;
  const Schedule before = cuda_on_cpu::schedule;
  std::vector<uint64_t> digests;
  for (const Schedule s : {Schedule{}, {Schedule::reverse}, {Schedule::random, 1}}) {
    cuda_on_cpu::schedule = s;
    digest = kDigestStart;
    tests();
    digests.push_back(digest);
  }
  cuda_on_cpu::schedule = before;
  for (const uint64_t d : digests) EXPECT(d == digests[0], "results depend on the schedule");
}

// Sanitizers take their time: they run the tests under one schedule, which CUDA_ON_CPU_SCHEDULE may
// choose, and only `few` of them under all.
inline int run_tests(void (*tests)(), void (*few)() = [] {}) {
  if (cuda_on_cpu::kSanitized || std::getenv("CUDA_ON_CPU_SCHEDULE"))
    under_all_schedules(few), tests();
  else
    under_all_schedules(tests);
  // A change that should not touch results leaves this number alone.
  std::printf("digest of all results %016llx\n", static_cast<unsigned long long>(digest));
  return finish();
}

}  // namespace randlora
