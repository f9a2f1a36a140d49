// The factored path, forward (equations in docs/math.md):
//
//   expand (d == in)    V = x A'^T,  y += s V B^T
//   reduce (d == out)   U = x B,     y += s U A'
//
// Scratch holds V and U for one group of token blocks at a time; nothing is kept for backward.
#pragma once
#include "a_side.h"
#include "b_planes.h"
#include "b_side.h"

namespace randlora::RANDLORA_ISA {

constexpr int kLines = 64;  // rows of B per output tile, for lists
constexpr int kGroup = 4;   // blocks that share one decoding of B's planes

// The row length of transposed gamma: n, padded to whole vectors.
template <class C>
RANDLORA_INLINE int64_t gamma_stride(const Basis& b) {
  constexpr int64_t lanes = kVectorBytes / int(sizeof(C));
  return (b.n + lanes - 1) / lanes * lanes;
}

template <class C>
void transpose_gamma(const Basis& b, const void* gam, C* gT, Runtime& rt) {
  const int64_t ldg = gamma_stride<C>(b);
  rt.split(b.d, 64, [&](int64_t begin, int64_t end) {
    transpose_matrix(static_cast<const C*>(gam) + begin, b.d, b.n, end - begin, gT + begin * ldg,
                     ldg, ldg);
  });
}

// How T tokens are divided: into blocks of TB, which slots take in groups.
struct TokenSplit {
  int64_t T, TB, blocks, group;
  int slots;

  TokenSplit(const Basis& b, int64_t tokens, int block, int threads) : T(tokens), TB(block) {
    blocks = (T + TB - 1) / TB;
    slots = int(blocks < threads ? blocks : threads);
    const int64_t share = slots ? (blocks + slots - 1) / slots : 1;
    group = !b.has_planes() ? 1 : share < kGroup ? share : int64_t{kGroup};
  }
  int64_t tokens(int64_t block) const { return T - block * TB < TB ? T - block * TB : TB; }
};

// One slot's scratch for taking a group of blocks through both sides.
template <class B>
struct Slot {
  using C = typename B::C;
  C *small, *large, *mid;  // (group, d, TB), (group, D, TB), (group, K, TB)
  C *lines, *scaled;       // (kLines, TB), (n, TB)
  QuadScratch<C> quads;
  int64_t small_step, large_step, mid_step;

  Slot(const Basis& b, int64_t group, Arena& arena)
      : small(arena.array<C>(group * b.d * B::TB)),
        large(arena.array<C>(group * b.D * B::TB)),
        mid(arena.array<C>(group * b.K() * B::TB)),
        lines(arena.array<C>(b.has_lists() ? kLines * B::TB : 0)),
        scaled(arena.array<C>(b.n * B::TB)),
        quads{arena.array<C>(b.has_planes() ? kQuads * kEntries * B::TB : 0),
              arena.array<uint8_t>(QuadScratch<C>::numbers(b))},
        small_step(b.d * B::TB),
        large_step(b.D * B::TB),
        mid_step(b.K() * B::TB) {}
};

// out (T, D) (+)= scale * v B^T for blocks [first, first + count). Lists take kLines features at a
// time, so that the sums are still in the L1 cache when stored; planes fill all of s.large first.
template <class B>
void emit_up(const Basis& b, const TokenSplit& split, Slot<B>& s, int64_t first, int count,
             double scale, bool accumulate, void* out, DType dtype) {
  const auto emit = [&](int g, const auto* sums, int64_t o, int64_t lines) {
    store_block<B>(sums, typename B::C(scale), accumulate, split.tokens(first + g), lines, out,
                   dtype, (first + g) * B::TB, b.D, o);
  };
  if (!b.has_lists()) {
    planes_up<B>(b, count, s.mid, s.large, s.quads);
    for (int g = 0; g < count; ++g) emit(g, s.large + g * s.large_step, 0, b.D);
    return;
  }
  for (int64_t o = 0; o < b.D; o += kLines) {
    const int64_t lines = b.D - o < kLines ? b.D - o : kLines;
    for (int g = 0; g < count; ++g) {
      sum_lists<B>(b.b_rows, o, o + lines, s.mid + g * s.mid_step, s.lines);
      emit(g, s.lines, o, lines);
    }
  }
}

// u = B^T s.large, then fn(g, j, u of j) for each block g and rank index j. Lists compute one rank
// index at a time, always in the same memory, so that u stays in the L1 cache.
template <class B, class F>
void down(const Basis& b, Slot<B>& s, int count, const F& fn) {
  if (b.has_planes()) planes_down<B>(b, count, s.large, s.mid, s.quads);
  for (int64_t j = 0; j < b.r; ++j)
    for (int g = 0; g < count; ++g) {
      auto* u = s.mid + g * s.mid_step;
      if (b.has_lists())
        sum_lists<B>(b.b_cols, j * b.n, (j + 1) * b.n, s.large + g * s.large_step, u);
      else
        u += j * b.n * B::TB;
      fn(g, j, u);
    }
}

template <class B>
void linear_blocks(const Linear& p, Runtime& rt) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const TokenSplit split(b, p.T, B::TB, rt.width());
  const int64_t ldg = gamma_stride<C>(b);
  const C* lam = static_cast<const C*>(p.lam);
  Arena shared, per_slot;
  shared.array<C>(b.d * ldg);
  Slot<B>(b, split.group, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + split.slots * per_slot.used()));
  C* gT = Arena(memory).array<C>(b.d * ldg);
  transpose_gamma(b, p.gam, gT, rt);

  rt.each_slot(split.slots, [&](int slot) {
    Arena own(memory + shared.used() + slot * per_slot.used());
    Slot<B> s(b, split.group, own);
    for (int64_t first = slot * split.group; first < split.blocks;
         first += split.slots * split.group) {
      const int count =
          int(split.blocks - first < split.group ? split.blocks - first : split.group);
      const auto each = [&](const auto& fn) {
        for (int g = 0; g < count; ++g) fn(g, (first + g) * B::TB, split.tokens(first + g));
      };
      if (p.expand) {
        each([&](int g, int64_t t, int64_t tokens) {
          load_block<B>(p.x, p.dtype, t, b.d, tokens, s.small);
          a_up<B>(b, lam, gT, ldg, s.small, s.mid + g * s.mid_step);
        });
        emit_up<B>(b, split, s, first, count, p.scale, p.accumulate, p.y, p.dtype);
      } else {
        each([&](int g, int64_t t, int64_t tokens) {
          load_block<B>(p.x, p.dtype, t, b.D, tokens, s.large + g * s.large_step);
        });
        __builtin_memset(s.small, 0, size_t(count * s.small_step) * sizeof(C));
        down<B>(b, s, count, [&](int g, int64_t j, const C* u) {
          a_down<B>(b, j, lam + j * b.n, gT, ldg, u, s.scaled, s.small + g * s.small_step);
        });
        each([&](int g, int64_t t, int64_t tokens) {
          store_block<B>(s.small + g * s.small_step, C(p.scale), p.accumulate, tokens, b.d, p.y,
                         p.dtype, t, b.d, 0);
        });
      }
    }
  });
}

inline void linear(const Linear& p, Runtime& rt) {
  with_block(p.dtype, p.T, rt, [&](auto b) { linear_blocks<decltype(b)>(p, rt); });
}

}  // namespace randlora::RANDLORA_ISA
