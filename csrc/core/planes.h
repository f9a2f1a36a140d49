// Bit planes: the dense packed format of a ternary matrix, two bits per element.
//
//   planes[0][row][word]  bit b is set if element (row, 64 * word + b) is +1
//   planes[1][row][word]  the same for -1;  bits past the last column are zero
#pragma once
#include <cstdint>

#include "host_device.h"

namespace randlora {

RANDLORA_HD int64_t words_of(int64_t cols) { return (cols + 63) / 64; }

struct Planes {
  const uint64_t* plus = nullptr;  // (rows, words)
  const uint64_t* minus = nullptr;
  int64_t words = 0;

  // `count` <= 64 bits of a row from column `col` on, moved to bit 0. They may span two words.
  RANDLORA_HD_MEMBER static uint64_t bits(const uint64_t* row, int64_t col, int64_t count) {
    const int64_t word = col >> 6, shift = col & 63;
    uint64_t m = row[word] >> shift;
    if (shift != 0 && shift + count > 64) m |= row[word + 1] << (64 - shift);
    return count == 64 ? m : m & ((uint64_t{1} << count) - 1);
  }
};

// Transposes in place: bit c of word r becomes bit r of word c. Six rounds swap the off-diagonal
// quarters of ever smaller squares (32, 16, ..., 1).
RANDLORA_HD void transpose_64x64(uint64_t* m) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int s = 32; s != 0; s >>= 1, mask ^= mask << s)
    for (int r = 0; r < 64; r = (r + s + 1) & ~s) {
      const uint64_t t = ((m[r] >> s) ^ m[r + s]) & mask;
      m[r] ^= t << s;
      m[r + s] ^= t;
    }
}

}  // namespace randlora
