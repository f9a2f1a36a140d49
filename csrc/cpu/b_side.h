// The B side of independent bases: each output line is a sum of signed source rows.
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
template <class Block>
void sum_lists(const Lists& lists, int64_t begin, int64_t end, const typename Block::C* src,
               typename Block::C* dst) {
  using Vector = typename Block::Vector;
  for (int64_t line = begin; line < end; ++line) {
    Vector positive[Block::kVectors] = {}, negative[Block::kVectors] = {};
    const auto add = [src](Vector(&to)[Block::kVectors], const uint16_t* index,
                           int64_t p) RANDLORA_INLINED {
      for (int q = 0; q < Block::kVectors; ++q)
        to[q] += load<Vector>(src + int64_t(index[p]) * Block::kTokens + q * Block::kLanes);
    };
    const uint16_t *plus = lists.index + lists.plus(line), *minus = lists.index + lists.minus(line);
    const int64_t n_plus = minus - plus, n_minus = lists.end(line) - lists.minus(line);
    const int64_t both = n_plus < n_minus ? n_plus : n_minus;
    for (int64_t p = 0; p < both; ++p) {
      add(positive, plus, p);
      add(negative, minus, p);
    }
    for (int64_t p = both; p < n_plus; ++p) add(positive, plus, p);
    for (int64_t p = both; p < n_minus; ++p) add(negative, minus, p);
    for (int q = 0; q < Block::kVectors; ++q)
      store(dst + (line - begin) * Block::kTokens + q * Block::kLanes, positive[q] - negative[q]);
  }
}

constexpr int kLines = 64;  // rows of B per output tile, for lists

// How T tokens are divided into blocks, which slots take in turn.
struct TokenSplit {
  int64_t T, of_block, blocks;
  int slots;

  TokenSplit(int64_t tokens, int block, int threads) : T(tokens), of_block(block) {
    blocks = (T + of_block - 1) / of_block;
    slots = int(blocks < threads ? blocks : threads);
  }
  int64_t tokens(int64_t block) const {
    const int64_t left = T - block * of_block;
    return left < of_block ? left : of_block;
  }
};

// One slot's scratch for taking a block through both sides.
template <class Block>
struct Slot {
  using C = typename Block::C;
  C *small, *large, *mid;  // (d, tokens), (D, tokens), (K, tokens)
  C *lines, *scaled;       // (kLines, tokens), (n, tokens)
  C* table;                // of planes

  Slot(const TernaryBases& b, Arena& arena)
      : small(arena.array<C>(b.d * Block::kTokens)),
        large(arena.array<C>(b.D * Block::kTokens)),
        mid(arena.array<C>(b.K() * Block::kTokens)),
        lines(arena.array<C>(b.has_planes() ? 0 : kLines * Block::kTokens)),
        scaled(arena.array<C>(b.n * Block::kTokens)),
        table(arena.array<C>(table_length<Block>(b))) {}
};

// out (T, D) (+)= scale * v B^T for one block. Lists take kLines features at a time, so that the
// sums are still in the L1 cache when stored; planes fill all of own.large first.
template <class Block>
void emit_up(const TernaryBases& b, const QuadNumbers& numbers, const TokenSplit& split,
             Slot<Block>& own, int64_t block, double scale, bool accumulate, void* out,
             DType dtype) {
  const auto emit = [&](const auto* sums, int64_t o, int64_t lines) {
    store_block<Block>(sums, typename Block::C(scale), accumulate, split.tokens(block), lines, out,
                       dtype, block * Block::kTokens, b.D, o);
  };
  if (b.has_planes()) {
    sum_planes<Block>(numbers, own.mid, own.large, own.table);
    return emit(own.large, 0, b.D);
  }
  for (int64_t o = 0; o < b.D; o += kLines) {
    const int64_t lines = b.D - o < kLines ? b.D - o : kLines;
    sum_lists<Block>(b.b_rows, o, o + lines, own.mid, own.lines);
    emit(own.lines, o, lines);
  }
}

// u = B^T own.large, then fn(j, u of j) for each rank index j. Lists compute one rank index at a
// time, always in the same memory, so that u stays in the L1 cache.
template <class Block, class F>
void down(const TernaryBases& b, const QuadNumbers& numbers, Slot<Block>& own, const F& fn) {
  if (b.has_planes()) sum_planes<Block>(numbers, own.large, own.mid, own.table);
  for (int64_t j = 0; j < b.r; ++j) {
    auto* u = own.mid;
    if (b.has_planes())
      u += j * b.n * Block::kTokens;
    else
      sum_lists<Block>(b.b_cols, j * b.n, (j + 1) * b.n, own.large, u);
    fn(j, u);
  }
}

}  // namespace randlora::RANDLORA_ISA
