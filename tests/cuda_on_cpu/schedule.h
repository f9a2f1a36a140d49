// The order in which blocks and their threads run.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "engine.h"

namespace cuda_on_cpu {

struct Schedule {
  enum Order { forward, reverse, random } order = forward;
  unsigned seed = 0;

  static Schedule of_environment() {
    const char* text = getenv("CUDA_ON_CPU_SCHEDULE");
    if (!text || !strcmp(text, "forward")) return {};
    if (!strcmp(text, "reverse")) return {reverse, 0};
    if (!strncmp(text, "random:", 7)) return {random, static_cast<unsigned>(atoi(text + 7))};
    throw Error("CUDA_ON_CPU_SCHEDULE is forward, reverse or random:SEED");
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

}  // namespace cuda_on_cpu
