// The packed formats of a ternary matrix.
//
// Bit planes, for dense ones: two bits per element.
//
//   planes[0][row][word]  bit b is set if element (row, 64 * word + b) is +1
//   planes[1][row][word]  the same for -1;  bits past the last column are zero
//
// Sorted, sign-split index lists, for sparse ones, by row or column. Because runs are split by
// sign, kernels decode no signs: they add one run and subtract the next.
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

// Where the runs of line q begin and end.
struct Runs {
  const int64_t* offset = nullptr;

  RANDLORA_HD_MEMBER int64_t plus(int64_t q) const { return offset[2 * q]; }
  RANDLORA_HD_MEMBER int64_t minus(int64_t q) const { return offset[2 * q + 1]; }
  RANDLORA_HD_MEMBER int64_t end(int64_t q) const { return offset[2 * q + 2]; }
};

template <class Index_>  // uint16_t if every position fits, else uint32_t
struct Lists : Runs {
  using Index = Index_;
  const Index* index;
};

// The first x in [begin, end) with index[x] >= bound, or end.
template <class Index>
RANDLORA_HD int64_t lower_bound(const Index* index, int64_t begin, int64_t end, int64_t bound) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (index[middle] < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Lists of either type, for the operator structs.
struct AnyLists : Runs {
  const void* index = nullptr;
  int64_t count = 0;  // total entries; with CUDA the host cannot read `offset`
  bool wide = false;  // positions are uint32, not uint16

  // One position, for loops that have much to do for each; others take `typed`.
  RANDLORA_HOST_MEMBER int64_t at(int64_t entry) const {
    return wide ? int64_t{static_cast<const uint32_t*>(index)[entry]}
                : int64_t{static_cast<const uint16_t*>(index)[entry]};
  }
  // Calls fn with the Lists of the right index type.
  template <class F>
  RANDLORA_HOST_MEMBER auto typed(const F& fn) const {
    return wide ? fn(Lists<uint32_t>{{offset}, static_cast<const uint32_t*>(index)})
                : fn(Lists<uint16_t>{{offset}, static_cast<const uint16_t*>(index)});
  }
};

}  // namespace randlora
