// Ternary elements as codes of two bits that turn into numbers by a shift and a mask.
//
// The upper bit of a code says negative, the lower bit not zero. Moved to the top of an IEEE number
// of any width, a code is the number 0, +2 or -2, because 2 has only the highest exponent bit set.
// So products with codes are exactly doubled, and storing a result halves the scale.
//
// A code word holds 16 successive elements of a line (a row or a column of B), those with even
// numbers in its lower half:
//
//   element 2t + e, t < 8, e < 2, at bits 16 e + 2t
//
// A tensor core needs two successive elements in the 16-bit halves of a register. That is
// word << (14 - 2t) & 0xc000c000: two instructions for two elements, in bf16 and f16 alike.
//
// Planes run along rows. A code word of a row takes two shifts and three selections for 32
// elements; a code word of a column takes a transpose of 16 x 16 codes by four shuffles.
#pragma once
#include "../../core/packed.h"
#include "element.h"

namespace randlora {

// ---- codes to numbers: doubled ------------------------------------------------------------------

// Elements 2t (low half) and 2t + 1 of a code word in a 16-bit type.
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, int t) {
  return word << (14 - 2 * t) & 0xc000c000u;
}

// Element 2t + e, as the upper 32 bits of a float or double.
__device__ __forceinline__ uint32_t decode_top(uint32_t word, int t, int e) {
  return word << (30 - 2 * t - 16 * e) & 0xc0000000u;
}
__device__ __forceinline__ float from_top(uint32_t top, float) { return float_of_bits(top); }
__device__ __forceinline__ double from_top(uint32_t top, double) {
  const uint64_t bits = static_cast<uint64_t>(top) << 32;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// ---- planes to codes ----------------------------------------------------------------------------

// 32 elements of a row: those with even numbers, and those with odd numbers, in order.
struct EvenOdd {
  uint32_t even, odd;
  __device__ __forceinline__ EvenOdd(uint32_t plus, uint32_t minus) {
    const uint32_t some = plus | minus;
    even = (some & 0x55555555u) | (minus << 1 & 0xaaaaaaaau);
    odd = (some >> 1 & 0x55555555u) | (minus & 0xaaaaaaaau);
  }
};

// The four code words of 64 elements of a row.
__device__ __forceinline__ void encode_row(uint64_t plus, uint64_t minus, uint32_t (&word)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const EvenOdd c(static_cast<uint32_t>(plus >> 32 * half),
                    static_cast<uint32_t>(minus >> 32 * half));
    word[2 * half] = (c.even & 0xffffu) | c.odd << 16;
    word[2 * half + 1] = c.even >> 16 | (c.odd & 0xffff0000u);
  }
}

// The row that lane l of a half-warp gives to encode_columns, so that rows 2t + e of the 16 become
// elements 2t + e of a code word.
__device__ __forceinline__ int row_of_lane(int l) { return l % 8 * 2 + l / 8; }

// 16 x 16 codes: lane l of each half-warp gives 16 codes and gets code l of every lane, in the
// order of lanes. Four rounds swap the off-diagonal quarters of ever smaller squares.
__device__ __forceinline__ uint32_t transpose_codes(uint32_t x) {
  constexpr uint32_t kLower[] = {0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
#pragma unroll
  for (int round = 3; round >= 0; --round) {
    const bool upper = threadIdx.x >> round & 1;
    const int by = 2 << round;
    const uint32_t other = __shfl_xor_sync(kWarp, x, 1 << round);
    const uint32_t moved = upper ? other >> by : other << by;
    const uint32_t keep = upper ? ~kLower[round] : kLower[round];
    x = (x & keep) | (moved & ~keep);
  }
  return x;
}

// 64 columns of 16 rows. Lane l of each half-warp gives row row_of_lane(l); word[m] becomes the
// code word of column column_of_lane(l, m). All 32 lanes take part.
__device__ __forceinline__ void encode_columns(uint64_t plus, uint64_t minus, uint32_t (&word)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const EvenOdd c(static_cast<uint32_t>(plus >> 32 * half),
                    static_cast<uint32_t>(minus >> 32 * half));
    word[2 * half] = transpose_codes(c.even);
    word[2 * half + 1] = transpose_codes(c.odd);
  }
}
__device__ __forceinline__ int column_of_lane(int l, int m) {
  return m / 2 * 32 + l % 16 * 2 + m % 2;
}

}  // namespace randlora
