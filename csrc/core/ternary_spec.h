// Basis specification 1: element (role, row, col) of the infinite ternary matrix of a seed.
// docs/basis-spec.md defines it in words, and tests/helpers/basis_reference.py in NumPy. Every
// implementation must reproduce the test vectors in tests/data/basis_v1.txt.
#pragma once

#include <cstdint>

#include "philox.h"

namespace randlora {

constexpr uint32_t kSpecVersion = 1;  // the fourth counter word

// Not an enum class: the value itself goes into the counter.
enum Role : uint32_t {
  kRoleA = 0,         // row j (rank index), column k (feature of the smaller side)
  kRoleB = 1,         // row o (feature of the larger side), column c = j * n + i
  kRoleRounding = 2,  // core/stochastic.h
  // The signs of Hadamard bases, all in row 0: s, row and col.
  kRoleFeatures = 3,
  kRoleRows = 4,
  kRoleColumns = 5,
};

constexpr uint32_t kCountersPerGroup = 16;

// First counter word of a column.
RANDLORA_HD uint32_t block_of_column(uint32_t col) {
  return (col >> 6) * kCountersPerGroup + (col & 15u);
}

// Which of the four output words belongs to a column.
RANDLORA_HD uint32_t word_of_column(uint32_t col) { return (col >> 4) & 3u; }

RANDLORA_HD Counter4 counter_of(uint32_t role, uint32_t row, uint32_t block) {
  return Counter4{{block, row, role, kSpecVersion}};
}

RANDLORA_HD uint32_t key0_of(uint64_t seed) { return static_cast<uint32_t>(seed); }
RANDLORA_HD uint32_t key1_of(uint64_t seed) { return static_cast<uint32_t>(seed >> 32); }

// floor(density * 2^31 + 0.5), at least 1. A density outside (0, 1] or NaN gives 0, which is not a
// valid threshold; callers refuse it. The cast truncates, which is floor for positive numbers.
RANDLORA_HD uint32_t threshold(double density) {
  if (!(density > 0.0 && density <= 1.0)) return 0;
  const uint32_t rounded = static_cast<uint32_t>(density * 2147483648.0 + 0.5);
  return rounded < 1u ? 1u : rounded;
}

// The two halves of the value rule; they exclude each other for every threshold up to 2^31. The
// subtraction wraps: [threshold, 2 * threshold) becomes [0, threshold), so one unsigned compare
// serves, also at density 1 where 2 * threshold does not fit in 32 bits.
RANDLORA_HD bool is_plus(uint32_t u, uint32_t threshold) { return u < threshold; }
RANDLORA_HD bool is_minus(uint32_t u, uint32_t threshold) { return u - threshold < threshold; }

// The element itself, unscaled: -1, 0 or +1.
RANDLORA_HD int element(uint64_t seed, uint32_t role, uint32_t row, uint32_t col,
                        uint32_t threshold) {
  const Counter4 out =
      philox4x32_10(counter_of(role, row, block_of_column(col)), key0_of(seed), key1_of(seed));
  const uint32_t u = out.v[word_of_column(col)];
  return static_cast<int>(is_plus(u, threshold)) - static_cast<int>(is_minus(u, threshold));
}

}  // namespace randlora
