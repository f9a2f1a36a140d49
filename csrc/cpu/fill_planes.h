// Generates bit planes from the specification. 64 columns come from 16 counters with 4 output words
// each, so a word of a plane takes four 16-lane compares. Rows and columns may start anywhere.
#pragma once
#include "../core/operators.h"
#include "../core/ternary_spec.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

// Bit l is set if lanes[l] < bound.
RANDLORA_INLINE uint64_t below(const uint32_t (&lanes)[16], uint32_t bound) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask(_mm512_loadu_si512(lanes), _mm512_set1_epi32(int(bound)));
#else
  uint64_t mask = 0;
  for (int l = 0; l < 16; ++l) mask |= uint64_t{lanes[l] < bound} << l;
  return mask;
#endif
}

// philox4x32_10 on 16 counters at once, so that compilers vectorize each line.
RANDLORA_INLINE void philox_16(uint64_t seed, uint32_t (&c)[4][16]) {
  uint32_t key0 = key0_of(seed), key1 = key1_of(seed);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < 16; ++l) {
      const uint64_t p0 = uint64_t{kPhiloxMul0} * c[0][l], p1 = uint64_t{kPhiloxMul1} * c[2][l];
      const uint32_t c1 = c[1][l], c3 = c[3][l];
      c[0][l] = uint32_t(p1 >> 32) ^ c1 ^ key0;
      c[1][l] = uint32_t(p1);
      c[2][l] = uint32_t(p0 >> 32) ^ c3 ^ key1;
      c[3][l] = uint32_t(p0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// The words of both planes for aligned group `group` (columns 64 * group ...) of one row.
RANDLORA_INLINE void group_words(const FillPlanes& p, uint32_t row, uint32_t group,
                                 uint64_t (&words)[2]) {
  uint32_t c[4][16];
  for (uint32_t l = 0; l < 16; ++l) {
    const Counter4 start = counter_of(p.role, row, group * kCountersPerGroup + l);
    for (int w = 0; w < 4; ++w) c[w][l] = start.v[w];
  }
  philox_16(p.seed, c);
  words[0] = words[1] = 0;
  for (int w = 0; w < 4; ++w) {
    words[0] |= below(c[w], p.threshold) << (16 * w);
    for (int l = 0; l < 16; ++l) c[w][l] -= p.threshold;  // wraps, see is_minus in ternary_spec.h
    words[1] |= below(c[w], p.threshold) << (16 * w);
  }
}

inline void fill_planes(const FillPlanes& p, Runtime& rt) {
  const int64_t words = words_of(p.cols), shift = p.col_start & 63, group = p.col_start >> 6;
  const uint64_t tail = p.cols % 64 ? (uint64_t{1} << (p.cols % 64)) - 1 : ~uint64_t{0};
  rt.split(p.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      const uint32_t row = uint32_t(p.row_start + q);
      uint64_t next[2];
      group_words(p, row, uint32_t(group), next);
      for (int64_t w = 0; w < words; ++w) {
        uint64_t word[2] = {next[0], next[1]};
        // The last word may need no bits of the next group, which may not exist.
        if (64 * (w + 1) - shift < p.cols) group_words(p, row, uint32_t(group + w + 1), next);
        for (int s = 0; s < 2 && shift != 0; ++s)
          word[s] = word[s] >> shift | next[s] << (64 - shift);
        const uint64_t keep = w + 1 == words ? tail : ~uint64_t{0};
        p.plus[q * words + w] = word[0] & keep;
        p.minus[q * words + w] = word[1] & keep;
      }
    }
  });
}

}  // namespace randlora::RANDLORA_ISA
