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
      const auto add = [&](V(&to)[B::NV], int64_t p) RANDLORA_INLINED {
        const auto* row = src + int64_t(lists.index[p]) * B::TB;
        for (int q = 0; q < B::NV; ++q) to[q] += load<V>(row + q * B::L);
      };
      int64_t p = lists.plus(line), m = lists.minus(line);
      const int64_t p_end = m, m_end = lists.end(line);
      for (; p < p_end && m < m_end; ++p, ++m) {
        add(positive, p);
        add(negative, m);
      }
      for (; p < p_end; ++p) add(positive, p);
      for (; m < m_end; ++m) add(negative, m);
      for (int q = 0; q < B::NV; ++q)
        store(dst + (line - begin) * B::TB + q * B::L, positive[q] - negative[q]);
    }
  });
}

}  // namespace randlora::RANDLORA_ISA
