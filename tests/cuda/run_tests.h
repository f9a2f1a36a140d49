// The main() of the tests of kernels: under every schedule, with results equal to the last bit.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "check.h"
#include "test_device.h"

namespace randlora {

// Sanitizers take their time: they see one schedule, which CUDA_ON_CPU_SCHEDULE may choose.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline int run_tests(void (*tests)()) {
  digest = kDigestStart;
  if (kSanitized || std::getenv("CUDA_ON_CPU_SCHEDULE")) {
    tests();
  } else {
    std::vector<uint64_t> digests;
    cuda_on_cpu::under_all_schedules([&] {
      digest = kDigestStart;
      tests();
      digests.push_back(digest);
    });
    for (const uint64_t d : digests) EXPECT(d == digests[0], "results depend on the schedule");
  }
  // A change that should not touch results leaves this number alone.
  std::printf("%d failures, digest of all results %016llx\n", failures,
              static_cast<unsigned long long>(digest));
  return failures != 0;
}

}  // namespace randlora
