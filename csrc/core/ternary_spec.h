// Basis specification 1: element (role, row, col) of the infinite ternary matrix of a seed.
// docs/basis-spec.md defines it in words, and tests/helpers/basis_reference.py in NumPy. Every
// implementation must reproduce the test vectors in tests/data/basis_v1.txt.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace randlora {

// ---- Philox4x32-10 -----------------------------------------------------------------------------
// A counter-based generator; maps a 128-bit counter and a 64-bit key to 128 bits. Salmon, Moraes,
// Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11; constants from the authors'
// Random123. docs/basis-spec.md section 1 states it in full.

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

struct Counter4 {
  uint32_t v[4];
};

// The full product of two words. nvcc does not always use the single instruction for it.
RANDLORA_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

// One output block of four 32-bit words.
RANDLORA_HD Counter4 philox4x32_10(Counter4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = wide_product(kPhiloxMul0, c0);
    const uint64_t product1 = wide_product(kPhiloxMul1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return Counter4{{c0, c1, c2, c3}};
}

// ---- the elements ------------------------------------------------------------------------------

constexpr uint32_t kSpecVersion = 1;  // the fourth counter word

// Not an enum class: the value itself goes into the counter.
enum Role : uint32_t {
  kRoleA = 0,  // row j (rank index), column k (feature of the smaller side)
  kRoleB = 1,  // row o (feature of the larger side), column c = j * n + i
  // 2 is reserved. The signs of Hadamard bases, all in row 0: s, row and col.
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
