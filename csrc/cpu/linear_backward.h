// The factored path, backward (equations in docs/math.md):
//
//   expand    U = dy B,     dx += s U A'       P_j = U_j^T x[:, S_j]
//   reduce    V = dy A'^T,  dx += s V B^T      U = x B,  P_j = U_j^T dy[:, S_j]
//   both      dlam[j, i] = s sum_k A gam P     dgam[i, k] = s sum_j A lam P
//
// Tokens are taken in super-blocks of a few blocks a thread:
//   phase 1, blocks per slot          dx; keeps z (the d-side operand) and U of the super-block
//   phase 2, rank indices per slot    P_j += U_j^T z[:, S_j], block after block
//   at the end                        dlam and dgam from P, bases per slot
// so no sum is ever split between threads, and scratch is bounded whatever T is.
#pragma once
#include "linear.h"

namespace randlora {
namespace RANDLORA_ISA {

template <class B>
struct BackwardScratch {
  using C = typename B::C;
  C *gT, *dgT;  // (d, ldg) each: gamma and its gradient, transposed
  C* P;         // (positions of A, ldg): row p belongs to the p-th entry of A's lists
  C* z;         // (super, d, TB)
  C* ut;        // (super, r, TB, ldg)
  BackwardScratch(const Basis& b, int64_t super, Arena& arena) {
    const int64_t ldg = gamma_stride<C>(b);
    gT = arena.take<C>(b.d * ldg);
    dgT = arena.take<C>(b.d * ldg);
    P = arena.take<C>(b.a.offset[2 * b.r] * ldg);
    z = arena.take<C>(super * b.d * B::TB);
    ut = arena.take<C>(super * b.r * B::TB * ldg);
  }
};

// Phase 1 for blocks [first, first + count); z and ut are those of `first` on.
template <class B>
void backward_group(const LinearBackward& p, const Cut& cut, Slot<B>& s, const typename B::C* gT,
                    int64_t first, int count, typename B::C* z, typename B::C* ut) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const C* lam = static_cast<const C*>(p.lam);
  const int64_t ldg = gamma_stride<C>(b), z_step = b.d * B::TB, ut_step = b.r * B::TB * ldg;
  const auto load = [&](const void* from, int64_t features, C* to, int64_t step) {
    for (int g = 0; g < count; ++g)
      load_block<B>(from, p.dtype, (first + g) * B::TB, features, cut.tokens(first + g),
                    to + g * step);
  };
  const auto keep = [&](int g, int64_t j, const C* u) {
    transpose_bases<B>(u, b.n, ldg, ut + g * ut_step + j * B::TB * ldg);
  };
  if (p.expand) {
    load(p.dy, b.D, s.large, s.large_step);
    if (p.dx) __builtin_memset(s.small, 0, size_t(count * s.small_step) * sizeof(C));
    down<B>(b, s, count, [&](int g, int64_t j, const C* u) {
      if (p.dx) a_down<B>(b, j, lam + j * b.n, gT, ldg, u, s.scaled, s.small + g * s.small_step);
      if (grads) keep(g, j, u);
    });
    if (p.dx)
      for (int g = 0; g < count; ++g)
        store_block<B>(s.small + g * s.small_step, C(p.scale), p.accumulate, cut.tokens(first + g),
                       b.d, p.dx, p.dtype, (first + g) * B::TB, b.d, 0);
    if (grads) load(p.x, b.d, z, z_step);
  } else {
    load(p.dy, b.d, z, z_step);
    if (p.dx) {
      for (int g = 0; g < count; ++g)
        a_up<B>(b, lam, gT, ldg, z + g * z_step, s.mid + g * s.mid_step);
      emit_up<B>(b, cut, s, first, count, p.scale, p.accumulate, p.dx, p.dtype);
    }
    if (grads) {
      load(p.x, b.D, s.large, s.large_step);
      down<B>(b, s, count, keep);
    }
  }
}

template <class C, class Index>
void reduce_P(const LinearBackward& p, const Lists<Index>& a, const C* gT, const C* P, C* dgT,
              Runtime& rt) {
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const Basis& b = p.basis;
  const int64_t ldg = gamma_stride<C>(b);
  const C scale = C(p.scale), *lam = static_cast<const C*>(p.lam);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  // By vectors of bases: each owns its columns of dlam and of dgT, and adds rank indices in order.
  rt.split(ldg, L, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += L) {
      const int64_t bases = b.n - i < L ? b.n - i : L;
      for (int64_t k = 0; k < b.d; ++k) store(dgT + k * ldg + i, V{});
      for (int64_t j = 0; j < b.r; ++j) {
        V sum{}, lam_j{};
        for (int64_t l = 0; l < bases; ++l) lam_j[l] = lam[j * b.n + i + l] * scale;
        for (int64_t q = a.plus(j); q < a.end(j); ++q) {
          const int64_t at = a.index[q] * ldg + i;
          const V Pq = load<V>(P + q * ldg + i) * (q < a.minus(j) ? C(1) : C(-1));
          sum += Pq * load<V>(gT + at);
          store(dgT + at, load<V>(dgT + at) + Pq * lam_j);
        }
        for (int64_t l = 0; l < bases; ++l) dlam[j * b.n + i + l] = sum[l] * scale;
      }
      transpose_matrix(dgT + i, ldg, b.d, bases, dgam + i * b.d, b.d);
    }
  });
}

template <class B>
void linear_backward_blocks(const LinearBackward& p, Runtime& rt) {
  using C = typename B::C;
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  const Cut cut(b, p.T, B::TB, rt.width());
  const int64_t most = int64_t{kGroup} * rt.width();
  const int64_t super = cut.blocks < most ? cut.blocks : most;
  const int64_t ldg = gamma_stride<C>(b);

  Arena shared, per_slot;
  BackwardScratch<B>(b, super, shared);
  Slot<B>(b, cut.group, per_slot);
  char* memory = static_cast<char*>(rt.scratch(shared.used() + cut.slots * per_slot.used()));
  Arena arena(memory);
  BackwardScratch<B> w(b, super, arena);
  transpose_gamma(b, p.gam, w.gT, rt);
  if (grads) __builtin_memset(w.P, 0, size_t(b.a.offset[2 * b.r] * ldg) * sizeof(C));

  const int64_t z_step = b.d * B::TB, ut_step = b.r * B::TB * ldg;
  for (int64_t base = 0; base < cut.blocks; base += super) {
    const int64_t last = cut.blocks - base < super ? cut.blocks : base + super;
    rt.each_slot(cut.slots, [&](int slot) {
      Arena own(memory + shared.used() + slot * per_slot.used());
      Slot<B> s(b, cut.group, own);
      for (int64_t first = base + slot * cut.group; first < last; first += cut.slots * cut.group) {
        const int count = int(last - first < cut.group ? last - first : cut.group);
        backward_group<B>(p, cut, s, w.gT, first, count, w.z + (first - base) * z_step,
                          w.ut + (first - base) * ut_step);
      }
    });
    if (!grads) continue;
    rt.split(b.r, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t block = base; block < last; ++block)
          a_grad<B>(b, j, ldg, cut.tokens(block), w.z + (block - base) * z_step,
                    w.ut + (block - base) * ut_step, w.P);
    });
  }
  if (!grads) return;
  b.wide ? reduce_P<C>(p, b.a.as<uint32_t>(), w.gT, w.P, w.dgT, rt)
         : reduce_P<C>(p, b.a.as<uint16_t>(), w.gT, w.P, w.dgT, rt);
}

inline void linear_backward(const LinearBackward& p, Runtime& rt) {
  const auto run = [&](auto b) {
    using B = decltype(b);
    rt.set_single(p.T <= B::TB);
    linear_backward_blocks<B>(p, rt);
  };
  if (p.dtype == DType::f64)
    with_block<double>(p.T, run);
  else
    with_block<float>(p.T, run);
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
