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

// dst[line - begin] for lines [begin, end) of B's rows or columns. The + and - runs of a line share
// one loop, because two chains of adds hide each other's latency.
template <class B>
void sum_lists(const AnyLists& any, int64_t begin, int64_t end, const typename B::C* src,
               typename B::C* dst) {
  using V = typename B::V;
  any.typed([&](const auto& lists) {
    for (int64_t line = begin; line < end; ++line) {
      V positive[B::NV] = {}, negative[B::NV] = {};
      const auto add = [src](V(&to)[B::NV], const auto* index, int64_t p) RANDLORA_INLINED {
        for (int q = 0; q < B::NV; ++q)
          to[q] += load<V>(src + int64_t(index[p]) * B::TB + q * B::L);
      };
      const auto *plus = lists.index + lists.plus(line), *minus = lists.index + lists.minus(line);
      const int64_t n_plus = minus - plus, n_minus = lists.end(line) - lists.minus(line);
      const int64_t both = n_plus < n_minus ? n_plus : n_minus;
      for (int64_t p = 0; p < both; ++p) {
        add(positive, plus, p);
        add(negative, minus, p);
      }
      for (int64_t p = both; p < n_plus; ++p) add(positive, plus, p);
      for (int64_t p = both; p < n_minus; ++p) add(negative, minus, p);
      for (int q = 0; q < B::NV; ++q)
        store(dst + (line - begin) * B::TB + q * B::L, positive[q] - negative[q]);
    }
  });
}

}  // namespace randlora::RANDLORA_ISA
