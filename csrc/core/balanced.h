// The packed format of a balanced ternary matrix (lines, r * n), whose columns fall into r groups of n
// by c % r:
//
//   group g:   lines row[offset[g] .. offset[g + 1]), ascending, have it in their support
//   entry p:   bit b of sign[p][w] is the sign of column (32 * w + b) * r + g, set for -1; zero from n on
//
// So for every group the matrix is a dense one of signs on gathered lines.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace randlora {

RANDLORA_HD int64_t sign_words_of(int64_t n) { return (n + 31) / 32; }

struct Balanced {
  const int64_t* offset = nullptr;  // (r + 1)
  const void* row = nullptr;        // (entries) uint16, or uint32 where `wide`
  const uint32_t* sign = nullptr;   // (entries, words)
  int64_t words = 0;
  bool wide = false;
  int64_t count = 0;  // of entries

  RANDLORA_HD_MEMBER int64_t line(int64_t p) const {
    return wide ? static_cast<const uint32_t*>(row)[p] : static_cast<const uint16_t*>(row)[p];
  }
  // The first entry of a group whose line is `from` or a later one.
  RANDLORA_HD_MEMBER int64_t first(int64_t group, int64_t from) const {
    int64_t begin = offset[group], end = offset[group + 1];
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      line(middle) < from ? begin = middle + 1 : end = middle;
    }
    return begin;
  }
  // Which of the up to 32 elements of a word are there.
  RANDLORA_HD_MEMBER static uint32_t present(int64_t n, int64_t word) {
    return n - 32 * word >= 32 ? ~uint32_t{0} : (uint32_t{1} << (n - 32 * word)) - 1;
  }
};

}  // namespace randlora
