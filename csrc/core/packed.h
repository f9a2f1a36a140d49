// The packed formats of a ternary matrix.
//
// Bit planes, for dense ones: two bits per element.
//
//   planes[0][row][word]  bit b is set if element (row, 64 * word + b) is +1
//   planes[1][row][word]  the same for -1;  bits past the last column are zero
//
// Sorted, sign-split index lists, for sparse ones, by row or column. Because runs are split by
// sign, kernels decode no signs: they add one run and subtract the next. Positions have 16 bits.
//
//   line q:  +1 at index[offset[2q]     .. offset[2q + 1])   ascending
//            -1 at index[offset[2q + 1] .. offset[2q + 2])   ascending
#pragma once
#include <cstdint>

#include "host_device.h"

namespace randlora {

RANDLORA_HD int64_t words_of(int64_t cols) { return (cols + 63) / 64; }

struct Planes {
  const uint64_t* plus = nullptr;  // (rows, words)
  const uint64_t* minus = nullptr;
  int64_t words = 0;
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

// A line that lists can hold has at most so many positions.
constexpr int64_t kLongestLine = int64_t{1} << 16;

struct Lists {
  const int64_t* offset = nullptr;
  const uint16_t* index = nullptr;
  int64_t count = 0;  // total entries; with CUDA the host cannot read `offset`

  // Where the runs of line q begin and end.
  RANDLORA_HD_MEMBER int64_t plus(int64_t q) const { return offset[2 * q]; }
  RANDLORA_HD_MEMBER int64_t minus(int64_t q) const { return offset[2 * q + 1]; }
  RANDLORA_HD_MEMBER int64_t end(int64_t q) const { return offset[2 * q + 2]; }
};

// The first x in [begin, end) with index[x] >= bound, or end.
RANDLORA_HD int64_t lower_bound(const uint16_t* index, int64_t begin, int64_t end, int64_t bound) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (index[middle] < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

}  // namespace randlora
