// The factored path (equations in docs/math.md):
//
//   up      V = from A'^T,  to += s V B^T
//   down    U = from B,     to += s U A'
//
// and for the gradients, with z the one of `from` and `other` on the d side, and U = B^T of the
// other one,
//
//   P_j = U_j^T z[:, S_j]   dlam[j, i] = s sum_k A gam P     dgam[i, k] = s sum_j A lam P
//
// For gradients, tokens are processed in super-blocks of a few blocks per thread:
//   phase 1, blocks per slot          `to`; keeps z and U of the super-block
//   phase 2, rank indices per slot    P_j += U_j^T z[:, S_j], block after block
//   at the end                        dlam and dgam from P, bases per slot
// so no sum is split between threads, and scratch is bounded for any T. If there is only one block,
// P_j is computed as soon as U_j is known, and U is not kept.
#pragma once
#include "a_side.h"
#include "b_side.h"

namespace randlora::RANDLORA_ISA {

// The row length of transposed gamma: n, padded to whole vectors.
template <class C>
RANDLORA_INLINE int64_t gamma_stride(const Basis& b) {
  constexpr int64_t lanes = kVectorBytes / int(sizeof(C));
  return (b.n + lanes - 1) / lanes * lanes;
}

// Blocks per thread in a super-block: their z and U should stay in the thread's L2 cache from phase
// 1 to phase 2.
constexpr int kBlocks = 2;

// Columns of dgamma that reduce_P sums at a time: as many as fit in half the L1 cache, because runs
// of A's lists should have more than one or two entries in a tile.
template <class C>
RANDLORA_INLINE int64_t tile_columns(int64_t ldg) {
  constexpr int64_t lanes = kVectorBytes / int(sizeof(C));
  const int64_t fit = 16384 / (ldg * int64_t{sizeof(C)}) / lanes * lanes;
  return fit > lanes ? fit : lanes;
}

// What all slots share; what follows gT is for gradients.
template <class B>
struct SharedScratch {
  using C = typename B::C;
  QuadNumbers up, down;  // of B's planes, for emit_up and for down
  C* gT;                 // (d, ldg): gamma transposed
  C* P;                  // (positions of A, ldg): row p belongs to the p-th entry of A's lists
  C* z;                  // (super, d, TB)
  C* ut;                 // U: (super, r, TB, ldg); for one block (TB, ldg), a rank index at a time
  C *lam, *dlam;         // (r, ldg) each: lambda times the scale, and the gradient without it
  C* tile;               // (tile_columns, ldg): some columns of dgamma, transposed
  int64_t* cursor;       // (threads, 2 r): the current position in each run of A's lists
  SharedScratch(const Linear& p, int64_t super, int threads, Arena& arena)
      : up(p.basis, false, p.up && p.to, arena), down(p.basis, true, !p.up || p.dlam, arena) {
    const Basis& b = p.basis;
    const int64_t ldg = gamma_stride<C>(b);
    gT = arena.array<C>(b.d * ldg);
    if (!p.dlam) return;
    lam = arena.array<C>(b.r * ldg);
    dlam = arena.array<C>(b.r * ldg);
    tile = arena.array<C>(tile_columns<C>(ldg) * ldg);
    cursor = arena.array<int64_t>(threads * 2 * b.r);
    P = arena.array<C>(b.a.offset[2 * b.r] * ldg);
    z = arena.array<C>(super * b.d * B::TB);
    ut = arena.array<C>((super > 1 ? super * b.r : 1) * B::TB * ldg);
  }
};

// Phase 1 for one block, whose z and ut are number `at` of w.z and w.ut.
template <class B>
void linear_block(const Linear& p, const TokenSplit& split, Slot<B>& s, const SharedScratch<B>& w,
                  int64_t block, int64_t at) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const C *lam = static_cast<const C*>(p.lam), *gT = w.gT;
  const int64_t ldg = gamma_stride<C>(b), first = block * B::TB, tokens = split.tokens(block);
  C* z = grads ? w.z + at * b.d * B::TB : s.small;
  C* ut = grads ? w.ut + at * b.r * B::TB * ldg : nullptr;
  const auto load = [&](const void* from, int64_t features, C* to) {
    load_block<B>(from, p.dtype, first, features, tokens, to);
  };
  const auto keep = [&](int64_t j, const C* u) {
    if (split.blocks > 1) return transpose_bases<B>(u, b.n, ldg, ut + j * B::TB * ldg);
    transpose_bases<B>(u, b.n, ldg, ut);
    a_grad<B>(b, j, ldg, tokens, z, ut, w.P, true);
  };
  if (p.up) {
    load(p.from, b.d, z);
    if (p.to) {
      a_up<B>(b, lam, gT, ldg, z, s.mid);
      emit_up<B>(b, w.up, split, s, block, p.scale, p.accumulate, p.to, p.dtype);
    }
    if (!grads) return;
    load(p.other, b.D, s.large);
    down<B>(b, w.down, s, keep);
  } else {
    load(p.from, b.D, s.large);
    if (grads) load(p.other, b.d, z);
    if (p.to) __builtin_memset(s.small, 0, size_t(b.d * B::TB) * sizeof(C));
    down<B>(b, w.down, s, [&](int64_t j, const C* u) {
      if (p.to) a_down<B>(b, j, lam + j * b.n, gT, ldg, u, s.scaled, s.small);
      if (grads) keep(j, u);
    });
    if (p.to)
      store_block<B>(s.small, C(p.scale), p.accumulate, tokens, b.d, p.to, p.dtype, first, b.d, 0);
  }
}

// dlam and dgam from P. A slot owns some vectors of bases, so no sum is split. It processes the
// columns of A in tiles, with all rank indices per tile: it reads P and writes dgam once, and the
// sums stay in the L1 cache.
template <class B, class Index>
void reduce_P(const Linear& p, const Lists<Index>& a, const SharedScratch<B>& w, Runtime& rt) {
  using C = typename B::C;
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const Basis& b = p.basis;
  const int64_t ldg = gamma_stride<C>(b), vectors = ldg / L;
  const C scale = C(p.scale), *lam = static_cast<const C*>(p.lam);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  const int slots = int(vectors < rt.width() ? vectors : rt.width());
  rt.each_slot(slots, [&](int slot) {
    const int64_t begin = vectors * slot / slots * L, end = vectors * (slot + 1) / slots * L;
    const int64_t bases = (b.n < end ? b.n : end) - begin;
    for (int64_t j = 0; j < b.r; ++j)
      for (int64_t i = begin; i < end; ++i) {
        w.lam[j * ldg + i] = i < b.n ? lam[j * b.n + i] * scale : C(0);
        w.dlam[j * ldg + i] = C(0);
      }
    int64_t* cursor = w.cursor + slot * 2 * b.r;
    for (int64_t run = 0; run < 2 * b.r; ++run) cursor[run] = a.offset[run];
    const int64_t step = tile_columns<C>(ldg);
    for (int64_t first = 0; first < b.d; first += step) {
      const int64_t columns = b.d - first < step ? b.d - first : step;
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t i = begin; i < end; i += L) store(w.tile + k * ldg + i, V{});
      for (int64_t run = 0; run < 2 * b.r; ++run) {
        const C sign = run % 2 ? C(-1) : C(1);
        const int64_t j = run / 2 * ldg;
        int64_t q = cursor[run];
        for (; q < a.offset[run + 1] && a.index[q] < first + columns; ++q) {
          const int64_t k = a.index[q];
          for (int64_t i = begin; i < end; i += L) {
            const V Pq = load<V>(w.P + q * ldg + i) * sign;
            C *sum = w.dlam + j + i, *to = w.tile + (k - first) * ldg + i;
            store(sum, load<V>(sum) + Pq * load<V>(w.gT + k * ldg + i));
            store(to, load<V>(to) + Pq * load<V>(w.lam + j + i));
          }
        }
        cursor[run] = q;
      }
      transpose_matrix(w.tile + begin, ldg, columns, bases, dgam + begin * b.d + first, b.d,
                       columns);
    }
    for (int64_t j = 0; j < b.r; ++j)
      for (int64_t i = begin; i < begin + bases; ++i)
        dlam[j * b.n + i] = w.dlam[j * ldg + i] * scale;
  });
}

template <class B>
void linear_blocks(const Linear& p, Runtime& rt) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const TokenSplit split(p.T, B::TB, rt.width());
  const int64_t most = grads ? kBlocks * int64_t{rt.width()} : split.blocks;
  const int64_t super = split.blocks < most ? split.blocks : most;
  const int64_t ldg = gamma_stride<C>(b);

  Arena shared, per_slot;
  SharedScratch<B>(p, super, rt.width(), shared);
  Slot<B>(b, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + split.slots * per_slot.used()));
  Arena arena(memory);
  SharedScratch<B> w(p, super, rt.width(), arena);
  number_lines(b, w.up, rt);
  number_lines(b, w.down, rt);
  rt.split(b.d, 64, [&](int64_t begin, int64_t end) {
    transpose_matrix(static_cast<const C*>(p.gam) + begin, b.d, b.n, end - begin,
                     w.gT + begin * ldg, ldg, ldg);
  });
  if (grads && split.blocks == 0)
    __builtin_memset(w.P, 0, size_t(b.a.offset[2 * b.r] * ldg) * sizeof(C));

  const int64_t z_step = b.d * B::TB, ut_step = b.r * B::TB * ldg;
  for (int64_t base = 0; base < split.blocks; base += super) {
    const int64_t last = split.blocks - base < super ? split.blocks : base + super;
    rt.each_slot(split.slots, [&](int slot) {
      Arena own(memory + shared.used() + slot * per_slot.used());
      Slot<B> s(b, own);
      for (int64_t block = base + slot; block < last; block += split.slots)
        linear_block<B>(p, split, s, w, block, block - base);
    });
    if (!grads || split.blocks == 1) continue;
    rt.split(b.r, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t block = base; block < last; ++block)
          a_grad<B>(b, j, ldg, split.tokens(block), w.z + (block - base) * z_step,
                    w.ut + (block - base) * ut_step + j * B::TB * ldg, w.P, block == 0);
    });
  }
  if (!grads) return;
  b.a.typed([&](const auto& a) { reduce_P<B>(p, a, w, rt); });
}

inline void linear(const Linear& p, Runtime& rt) {
  with_block(p.dtype, p.T, rt, [&](auto b) { linear_blocks<decltype(b)>(p, rt); });
}

}  // namespace randlora::RANDLORA_ISA
