// The B side of the factored path: each output line is a sum of signed source rows.
//
//   up    dst[o] = sum_c B[o, c] src[c]     lines are rows of B      (V -> y)
//   down  dst[c] = sum_o B[o, c] src[o]     lines are columns of B   (x or dy -> U)
//
// By lists, in memory order, for any range of lines, or by bit planes (b_planes.h).
#pragma once
#include "b_planes.h"

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

constexpr int kLines = 64;  // rows of B per output tile, for lists

// How T tokens are divided into blocks of TB, which slots take in turn.
struct TokenSplit {
  int64_t T, TB, blocks;
  int slots;

  TokenSplit(int64_t tokens, int block, int threads) : T(tokens), TB(block) {
    blocks = (T + TB - 1) / TB;
    slots = int(blocks < threads ? blocks : threads);
  }
  int64_t tokens(int64_t block) const { return T - block * TB < TB ? T - block * TB : TB; }
};

// One slot's scratch for taking a block through both sides.
template <class B>
struct Slot {
  using C = typename B::C;
  C *small, *large, *mid;  // (d, TB), (D, TB), (K, TB)
  C *lines, *scaled;       // (kLines, TB), (n, TB)
  C* table;                // of planes

  Slot(const Basis& b, Arena& arena)
      : small(arena.array<C>(b.d * B::TB)),
        large(arena.array<C>(b.D * B::TB)),
        mid(arena.array<C>(b.K() * B::TB)),
        lines(arena.array<C>(b.has_planes() ? 0 : kLines * B::TB)),
        scaled(arena.array<C>(b.n * B::TB)),
        table(arena.array<C>(table_length<B>(b))) {}
};

// out (T, D) (+)= scale * v B^T for one block. Lists take kLines features at a time, so that the
// sums are still in the L1 cache when stored; planes fill all of s.large first.
template <class B>
void emit_up(const Basis& b, const QuadNumbers& numbers, const TokenSplit& split, Slot<B>& s,
             int64_t block, double scale, bool accumulate, void* out, DType dtype) {
  const auto emit = [&](const auto* sums, int64_t o, int64_t lines) {
    store_block<B>(sums, typename B::C(scale), accumulate, split.tokens(block), lines, out, dtype,
                   block * B::TB, b.D, o);
  };
  if (b.has_planes()) {
    sum_planes<B>(numbers, s.mid, s.large, s.table);
    return emit(s.large, 0, b.D);
  }
  for (int64_t o = 0; o < b.D; o += kLines) {
    const int64_t lines = b.D - o < kLines ? b.D - o : kLines;
    sum_lists<B>(b.b_rows, o, o + lines, s.mid, s.lines);
    emit(s.lines, o, lines);
  }
}

// u = B^T s.large, then fn(j, u of j) for each rank index j. Lists compute one rank index at a
// time, always in the same memory, so that u stays in the L1 cache.
template <class B, class F>
void down(const Basis& b, const QuadNumbers& numbers, Slot<B>& s, const F& fn) {
  if (b.has_planes()) sum_planes<B>(numbers, s.large, s.mid, s.table);
  for (int64_t j = 0; j < b.r; ++j) {
    auto* u = s.mid;
    if (b.has_planes())
      u += j * b.n * B::TB;
    else
      sum_lists<B>(b.b_cols, j * b.n, (j + 1) * b.n, s.large, u);
    fn(j, u);
  }
}

}  // namespace randlora::RANDLORA_ISA
