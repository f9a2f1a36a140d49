// Backward of the factored path. Tokens are taken in super-blocks of a few blocks a thread:
//
//   phase 1, a block per slot:        dx of the block; keeps z (the d-side operand) and U
//   phase 2, rank indices per slot:   P_j += U_j^T z[:, S_j] over the super-block, in token order
//   at the end:                       dlam by rank index, dgam by base, from P
//
// So no sum is ever split between threads, and scratch is bounded whatever T is.
#pragma once
#include "linear.h"

namespace randlora {
namespace RANDLORA_ISA {

// Blocks a thread takes before phase 2; enough to amortise its two barriers.
constexpr int kBlocksPerThread = 4;

template <class B>
struct BackwardScratch {
  using C = typename B::C;
  C* gT;      // (d, ldg)
  C* P;       // (positions of A, ldg): row p belongs to the p-th entry of A's lists
  C* z;       // (super, d, TB)
  C* ut;      // (super, r, TB, ldg)
  BackwardScratch(const Basis& b, int64_t super, Arena& arena) {
    const int64_t ldg = Gamma<C>::stride(b.n);
    gT = arena.take<C>(b.d * ldg);
    P = arena.take<C>(b.a.offset[2 * b.r] * ldg);
    z = arena.take<C>(super * b.d * B::TB);
    ut = arena.take<C>(super * b.r * B::TB * ldg);
  }
};

// Phase 1 for the tokens of one block.
template <class B>
void backward_block(const LinearBackward& p, Slot<B>& s, const typename B::C* gT, int64_t t,
                    int64_t tokens, bool grads, typename B::C* z, typename B::C* ut) {
  using C = typename B::C;
  const Basis& b = p.basis;
  if (p.expand) {
    load_block<B>(p.dy, p.dtype, t, b.D, tokens, s.large);
    b_down<B>(b, 0, b.K(), s.large, s.mid, s.chunk);
    if (p.dx) {
      run_a_down<B>(b, p.lam, gT, s.mid, s.scaled, s.small);
      store_block<B>(s.small, C(p.scale), p.accumulate, tokens, b.d, p.dx, p.dtype, t, b.d, 0);
    }
    if (grads) load_block<B>(p.x, p.dtype, t, b.d, tokens, z);
  } else {
    load_block<B>(p.dy, p.dtype, t, b.d, tokens, z);
    if (p.dx) {
      run_a_up<B>(b, p.lam, gT, z, s.mid);
      emit_up<B>(b, s, p.scale, p.accumulate, tokens, p.dx, p.dtype, t);
    }
    if (grads) {
      load_block<B>(p.x, p.dtype, t, b.D, tokens, s.large);
      b_down<B>(b, 0, b.K(), s.large, s.mid, s.chunk);
    }
  }
  const int64_t ldg = Gamma<C>::stride(b.n);
  if (grads)
    for (int64_t j = 0; j < b.r; ++j)
      transpose_bases<B>(s.mid + j * b.n * B::TB, b.n, ldg, ut + j * B::TB * ldg);
}

// Phase 2 for rank index j: one more block of tokens into P_j.
template <class B, class Index>
void accumulate_P(const Basis& b, const Lists<Index>& a, int64_t j, int64_t tokens,
                  const typename B::C* z, const typename B::C* ut, typename B::C* P) {
  const int64_t ldg = Gamma<typename B::C>::stride(b.n), first = a.plus(j);
  a_grad<B>(a.index + first, a.end(j) - first, ldg, tokens, z, ut + j * B::TB * ldg,
            P + first * ldg);
}

template <class C, class Index>
void reduce_P(const LinearBackward& p, const Lists<Index>& a, const C* gT, const C* P,
              Runtime& rt) {
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const Basis& b = p.basis;
  const int64_t ldg = Gamma<C>::stride(b.n);
  const C scale = C(p.scale), *lam = static_cast<const C*>(p.lam);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  // By groups of L bases: each owns its columns of dlam and its rows of dgam.
  rt.split(ldg, L, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += L) {
      const int64_t bases = b.n - i < L ? b.n - i : L;
      for (int64_t l = 0; l < bases; ++l)
        __builtin_memset(dgam + (i + l) * b.d, 0, size_t(b.d) * sizeof(C));
      for (int64_t j = 0; j < b.r; ++j) {
        V sum{}, lam_j{};
        for (int64_t l = 0; l < bases; ++l) lam_j[l] = lam[j * b.n + i + l] * scale;
        for (int64_t q = a.plus(j); q < a.end(j); ++q) {
          const int64_t k = a.index[q];
          const V Pq = load<V>(P + q * ldg + i) * (q < a.minus(j) ? C(1) : C(-1));
          sum += Pq * load<V>(gT + k * ldg + i);
          const V add = Pq * lam_j;
          for (int64_t l = 0; l < bases; ++l) dgam[(i + l) * b.d + k] += add[l];
        }
        for (int64_t l = 0; l < bases; ++l) dlam[j * b.n + i + l] = sum[l] * scale;
      }
    }
  });
}

template <class B>
void linear_backward_blocks(const LinearBackward& p, Runtime& rt) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const int64_t blocks = (p.T + B::TB - 1) / B::TB;
  const int slots = int(blocks < rt.threads() ? blocks : rt.threads());
  const int64_t most = int64_t(kBlocksPerThread) * rt.threads();
  const int64_t super = blocks < most ? blocks : most;
  const int64_t ldg = Gamma<C>::stride(b.n);

  Arena shared, per_slot;
  BackwardScratch<B>(b, super, shared);
  Slot<B>(b, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + slots * per_slot.used()));
  Arena arena(memory);
  BackwardScratch<B> w(b, super, arena);
  Gamma<C>::transpose_into(b, p.gam, w.gT, rt);
  if (grads) __builtin_memset(w.P, 0, size_t(b.a.offset[2 * b.r] * ldg) * sizeof(C));

  const auto tokens_of = [&](int64_t block) {
    return p.T - block * B::TB < B::TB ? p.T - block * B::TB : int64_t(B::TB);
  };
  for (int64_t first = 0; first < blocks; first += super) {
    const int64_t last = blocks - first < super ? blocks : first + super;
    rt.each_slot(slots, [&](int slot) {
      Arena own(memory + shared.used() + slot * per_slot.used());
      Slot<B> s(b, own);
      for (int64_t block = first + slot; block < last; block += slots)
        backward_block<B>(p, s, w.gT, block * B::TB, tokens_of(block), grads,
                          w.z + (block - first) * b.d * B::TB,
                          w.ut + (block - first) * b.r * B::TB * ldg);
    });
    if (!grads) continue;
    rt.split(b.r, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t block = first; block < last; ++block) {
          const C* z = w.z + (block - first) * b.d * B::TB;
          const C* ut = w.ut + (block - first) * b.r * B::TB * ldg;
          b.wide ? accumulate_P<B>(b, b.a.as<uint32_t>(), j, tokens_of(block), z, ut, w.P)
                 : accumulate_P<B>(b, b.a.as<uint16_t>(), j, tokens_of(block), z, ut, w.P);
        }
    });
  }
  if (!grads) return;
  b.wide ? reduce_P<C>(p, b.a.as<uint32_t>(), w.gT, w.P, rt)
         : reduce_P<C>(p, b.a.as<uint16_t>(), w.gT, w.P, rt);
}

inline void linear_backward(const LinearBackward& p, Runtime& rt) {
  const auto run = [&](auto b) { linear_backward_blocks<decltype(b)>(p, rt); };
  if (p.dtype == DType::f64)
    with_block<double>(p.T, rt.threads(), run);
  else
    with_block<float>(p.T, rt.threads(), run);
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
