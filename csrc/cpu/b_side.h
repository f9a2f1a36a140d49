// The B side of the factored path: each output line is a sum of signed source rows.
//
//   up    dst[o] = sum_c B[o, c] src[c]     lines are rows of B      (V -> y)
//   down  dst[c] = sum_o B[o, c] src[o]     lines are columns of B   (x or dy -> U)
//
// This file sums by lists, in memory order, for any range of lines; b_planes.h by bit planes.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

// Token blocks side by side: bit planes are decoded once for all of them.
template <class C>
struct Blocks {
  int count;
  const C* src;
  int64_t src_step;
  C* dst;
  int64_t dst_step;
};

// acc += sum of src rows plus[..] - sum of src rows minus[..]. The two runs share one loop, because
// two chains of adds hide each other's latency.
template <class B, class Index>
RANDLORA_INLINE void sum_line(const Index* plus, int64_t n_plus, const Index* minus,
                              int64_t n_minus, const typename B::C* src,
                              typename B::V (&acc)[B::NV]) {
  using V = typename B::V;
  V positive[B::NV] = {}, negative[B::NV] = {};
  const auto add = [&](V(&to)[B::NV], const Index* index, int64_t p) RANDLORA_INLINED {
    for (int q = 0; q < B::NV; ++q) to[q] += load<V>(src + int64_t(index[p]) * B::TB + q * B::L);
  };
  const int64_t both = n_plus < n_minus ? n_plus : n_minus;
  for (int64_t p = 0; p < both; ++p) {
    add(positive, plus, p);
    add(negative, minus, p);
  }
  for (int64_t p = both; p < n_plus; ++p) add(positive, plus, p);
  for (int64_t p = both; p < n_minus; ++p) add(negative, minus, p);
  for (int q = 0; q < B::NV; ++q) acc[q] += positive[q] - negative[q];
}

// dst[line - begin] for lines [begin, end) of B's rows or columns.
template <class B>
void sum_lists(const AnyLists& any, int64_t begin, int64_t end, const typename B::C* src,
               typename B::C* dst) {
  any.typed([&](const auto& lists) {
    for (int64_t line = begin; line < end; ++line) {
      typename B::V acc[B::NV] = {};
      const int64_t plus = lists.plus(line), minus = lists.minus(line), last = lists.end(line);
      sum_line<B>(lists.index + plus, minus - plus, lists.index + minus, last - minus, src, acc);
      for (int q = 0; q < B::NV; ++q) store(dst + (line - begin) * B::TB + q * B::L, acc[q]);
    }
  });
}

}  // namespace randlora::RANDLORA_ISA
