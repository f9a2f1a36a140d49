// A linear layer on independent bases (equations in docs/math.md): products with A' and with B, its
// A side and its B side, in turn. dW is never formed.
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
//   at the end                        dlam and dgam from P, copies per slot
// so no sum is split between threads, and scratch is bounded for any T. If there is only one block,
// P_j is computed as soon as U_j is known, and U is not kept.
#pragma once
#include "a_side.h"
#include "b_side.h"

namespace randlora::RANDLORA_ISA {

// The row length of transposed gamma: n, padded to whole vectors.
template <class C>
RANDLORA_INLINE int64_t gamma_stride(const TernaryBases& b) {
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
template <class Block>
struct SharedScratch {
  using C = typename Block::C;
  QuadNumbers up, down;  // of B's planes, for emit_up and for down
  C* gT;                 // (d, ldg): gamma transposed
  C* P;                  // (positions of A, ldg): row p belongs to the p-th entry of A's lists
  C* z;                  // (super, d, tokens)
  C* ut;          // U: (super, r, tokens, ldg); for one block (tokens, ldg), a rank index at a time
  C *lam, *dlam;  // (r, ldg) each: lambda times the scale, and the gradient without it
  C* tile;        // (tile_columns, ldg): some columns of dgamma, transposed
  int64_t* cursor;  // (threads, 2 r): the current position in each run of A's lists
  SharedScratch(const IndependentLinear& p, int64_t super, int threads, Arena& arena)
      : up(p.basis, false, p.up && p.to, arena), down(p.basis, true, !p.up || p.dlam, arena) {
    const TernaryBases& b = p.basis;
    const int64_t ldg = gamma_stride<C>(b);
    gT = arena.array<C>(b.d * ldg);
    if (!p.dlam) return;
    lam = arena.array<C>(b.r * ldg);
    dlam = arena.array<C>(b.r * ldg);
    tile = arena.array<C>(tile_columns<C>(ldg) * ldg);
    cursor = arena.array<int64_t>(threads * 2 * b.r);
    P = arena.array<C>(b.a.offset[2 * b.r] * ldg);
    z = arena.array<C>(super * b.d * Block::kTokens);
    ut = arena.array<C>((super > 1 ? super * b.r : 1) * Block::kTokens * ldg);
  }
};

// Phase 1 for one block, whose z and ut are number `at` of shared.z and shared.ut.
template <class Block>
void linear_block(const IndependentLinear& p, const TokenSplit& split, Slot<Block>& own,
                  const SharedScratch<Block>& shared, int64_t block, int64_t at) {
  using C = typename Block::C;
  const TernaryBases& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const C *lam = static_cast<const C*>(p.lam), *gT = shared.gT;
  const int64_t ldg = gamma_stride<C>(b), first = block * Block::kTokens,
                tokens = split.tokens(block);
  C* z = grads ? shared.z + at * b.d * Block::kTokens : own.small;
  C* ut = grads ? shared.ut + at * b.r * Block::kTokens * ldg : nullptr;
  const auto load = [&](const void* from, int64_t features, C* to) {
    load_block<Block>(from, p.dtype, first, features, tokens, to);
  };
  const auto keep = [&](int64_t j, const C* u) {
    if (split.blocks > 1)
      return transpose_copies<Block>(u, b.n, ldg, ut + j * Block::kTokens * ldg);
    transpose_copies<Block>(u, b.n, ldg, ut);
    a_grad<Block>(b, j, ldg, tokens, z, ut, shared.P, true);
  };
  if (p.up) {
    load(p.from, b.d, z);
    if (p.to) {
      a_up<Block>(b, lam, gT, ldg, z, own.mid);
      emit_up<Block>(b, shared.up, split, own, block, p.scale, p.accumulate, p.to, p.dtype);
    }
    if (!grads) return;
    load(p.other, b.D, own.large);
    down<Block>(b, shared.down, own, keep);
  } else {
    load(p.from, b.D, own.large);
    if (grads) load(p.other, b.d, z);
    if (p.to) __builtin_memset(own.small, 0, size_t(b.d * Block::kTokens) * sizeof(C));
    down<Block>(b, shared.down, own, [&](int64_t j, const C* u) {
      if (p.to) a_down<Block>(b, j, lam + j * b.n, gT, ldg, u, own.scaled, own.small);
      if (grads) keep(j, u);
    });
    if (p.to)
      store_block<Block>(own.small, C(p.scale), p.accumulate, tokens, b.d, p.to, p.dtype, first,
                         b.d, 0);
  }
}

// dlam and dgam from P. A slot owns some vectors of copies, so no sum is split. It processes the
// columns of A in tiles, with all rank indices per tile: it reads P and writes dgam once, and the
// sums stay in the L1 cache.
template <class Block>
void reduce_P(const IndependentLinear& p, const SharedScratch<Block>& shared, int threads,
              Runtime& rt) {
  using C = typename Block::C;
  using Vector = Vec<C>;
  constexpr int kLanes = kVectorBytes / int(sizeof(C));
  const TernaryBases& b = p.basis;
  const Lists a = b.a;
  const int64_t ldg = gamma_stride<C>(b), vectors = ldg / kLanes;
  const C scale = C(p.scale), *lam = static_cast<const C*>(p.lam);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  const int slots = int(vectors < threads ? vectors : threads);
  rt.each_slot(slots, [&](int slot) {
    const int64_t begin = vectors * slot / slots * kLanes,
                  end = vectors * (slot + 1) / slots * kLanes;
    const int64_t copies = (b.n < end ? b.n : end) - begin;
    for (int64_t j = 0; j < b.r; ++j)
      for (int64_t i = begin; i < end; ++i) {
        shared.lam[j * ldg + i] = i < b.n ? lam[j * b.n + i] * scale : C(0);
        shared.dlam[j * ldg + i] = C(0);
      }
    int64_t* cursor = shared.cursor + slot * 2 * b.r;
    for (int64_t run = 0; run < 2 * b.r; ++run) cursor[run] = a.offset[run];
    const int64_t step = tile_columns<C>(ldg);
    for (int64_t first = 0; first < b.d; first += step) {
      const int64_t columns = b.d - first < step ? b.d - first : step;
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t i = begin; i < end; i += kLanes) store(shared.tile + k * ldg + i, Vector{});
      for (int64_t run = 0; run < 2 * b.r; ++run) {
        const C sign = run % 2 ? C(-1) : C(1);
        const int64_t j = run / 2 * ldg;
        int64_t q = cursor[run];
        for (; q < a.offset[run + 1] && a.index[q] < first + columns; ++q) {
          const int64_t k = a.index[q];
          for (int64_t i = begin; i < end; i += kLanes) {
            const Vector Pq = load<Vector>(shared.P + q * ldg + i) * sign;
            C *sum = shared.dlam + j + i, *to = shared.tile + (k - first) * ldg + i;
            store(sum, load<Vector>(sum) + Pq * load<Vector>(shared.gT + k * ldg + i));
            store(to, load<Vector>(to) + Pq * load<Vector>(shared.lam + j + i));
          }
        }
        cursor[run] = q;
      }
      transpose_matrix(shared.tile + begin, ldg, columns, copies, dgam + begin * b.d + first, b.d,
                       columns);
    }
    for (int64_t j = 0; j < b.r; ++j)
      for (int64_t i = begin; i < begin + copies; ++i)
        dlam[j * b.n + i] = shared.dlam[j * ldg + i] * scale;
  });
}

template <class Block>
void linear_blocks(const IndependentLinear& p, Runtime& rt) {
  using C = typename Block::C;
  const TernaryBases& b = p.basis;
  const bool grads = p.dlam != nullptr;
  // A single block takes longer if it moves between the caches of two cores.
  const int threads = p.T <= Block::kTokens ? 1 : rt.threads();
  const TokenSplit split(p.T, Block::kTokens, threads);
  const int64_t most = grads ? kBlocks * int64_t{threads} : split.blocks;
  const int64_t super = split.blocks < most ? split.blocks : most;
  const int64_t ldg = gamma_stride<C>(b);

  Arena shared_size, slot_size;
  SharedScratch<Block>(p, super, threads, shared_size);
  Slot<Block>(b, slot_size);
  char* memory =
      static_cast<char*>(rt.scratch(shared_size.used() + split.slots * slot_size.used()));
  Arena arena(memory);
  SharedScratch<Block> shared(p, super, threads, arena);
  number_lines(b, shared.up, threads, rt);
  number_lines(b, shared.down, threads, rt);
  rt.split(threads, b.d, 64, [&](int64_t begin, int64_t end) {
    transpose_matrix(static_cast<const C*>(p.gam) + begin, b.d, b.n, end - begin,
                     shared.gT + begin * ldg, ldg, ldg);
  });
  if (grads && split.blocks == 0)
    __builtin_memset(shared.P, 0, size_t(b.a.offset[2 * b.r] * ldg) * sizeof(C));

  const int64_t z_step = b.d * Block::kTokens, ut_step = b.r * Block::kTokens * ldg;
  for (int64_t base = 0; base < split.blocks; base += super) {
    const int64_t last = split.blocks - base < super ? split.blocks : base + super;
    rt.each_slot(split.slots, [&](int slot) {
      Arena own_memory(memory + shared_size.used() + slot * slot_size.used());
      Slot<Block> own(b, own_memory);
      for (int64_t block = base + slot; block < last; block += split.slots)
        linear_block<Block>(p, split, own, shared, block, block - base);
    });
    if (!grads || split.blocks == 1) continue;
    rt.split(threads, b.r, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t block = base; block < last; ++block)
          a_grad<Block>(b, j, ldg, split.tokens(block), shared.z + (block - base) * z_step,
                        shared.ut + (block - base) * ut_step + j * Block::kTokens * ldg, shared.P,
                        block == 0);
    });
  }
  if (grads) reduce_P<Block>(p, shared, threads, rt);
}

inline void independent_linear(const IndependentLinear& p, Runtime& rt) {
  with_block(p.dtype, p.T, [&](auto block) { linear_blocks<decltype(block)>(p, rt); });
}

}  // namespace randlora::RANDLORA_ISA
