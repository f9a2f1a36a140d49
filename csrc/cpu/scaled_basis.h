// A'[j * n + i, k] = scale * lam[j, i] * A[j, k] * gam[i, h * w + k] and its gradients. Row j of A
// has the w columns of its group h; with one group and scale 1 this is PEFT's UniqueBaseGrad. Each
// way takes one pass over the (K, w) matrix, without temporaries of that size.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora {
namespace RANDLORA_ISA {

template <class S>
void scaled_basis_as(const ScaledBasis& p, Runtime& rt) {
  using C = typename ComputeOf<S>::type;
  const C *A = static_cast<const C*>(p.A), *lam = static_cast<const C*>(p.lam),
          *gam = static_cast<const C*>(p.gam);
  S* out = static_cast<S*>(p.out);
  const int64_t w = p.d / p.groups, group_rows = p.r / p.groups;
  rt.split(p.r * p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t j = c / p.n, i = c % p.n;
      const C *a = A + j * w, *g = gam + i * p.d + j / group_rows * w, l = C(p.scale) * lam[c];
      S* row = out + c * w;
      for (int64_t k = 0; k < w; ++k) narrow(l * a[k] * g[k], row + k);
    }
  });
}

template <class S>
void scaled_basis_backward_as(const ScaledBasisBackward& p, Runtime& rt) {
  using C = typename ComputeOf<S>::type;
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const C *A = static_cast<const C*>(p.A), *lam = static_cast<const C*>(p.lam),
          *gam = static_cast<const C*>(p.gam);
  const S* grad = static_cast<const S*>(p.grad);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  const int64_t w = p.d / p.groups, group_rows = p.r / p.groups;
  // A base owns a row of dgam and a column of dlam, and reads each of its rows of grad once.
  rt.split(p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      __builtin_memset(dgam + i * p.d, 0, size_t(p.d) * sizeof(C));
      for (int64_t j = 0; j < p.r; ++j) {
        const int64_t c = j * p.n + i, in_gam = i * p.d + j / group_rows * w;
        const S* G = grad + c * w;
        const C *a = A + j * w, *g = gam + in_gam, l = C(p.scale) * lam[c];
        C* dg = dgam + in_gam;
        V sum{};
        C rest = 0;
        int64_t k = 0;
        for (; k + L <= w; k += L) {
          const V GA = load_as<V>(G + k) * load<V>(a + k);
          sum += GA * load<V>(g + k);
          store(dg + k, load<V>(dg + k) + GA * l);
        }
        for (; k < w; ++k) {
          const C GA = widen(G[k]) * a[k];
          rest += GA * g[k];
          dg[k] += GA * l;
        }
        for (int q = 0; q < L; ++q) rest += sum[q];
        dlam[c] = C(p.scale) * rest;
      }
    }
  });
}

template <class F>
RANDLORA_INLINE void with_dtype(DType dtype, const F& fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::f64: return fn(double{});
    case DType::bf16: return fn(bf16{});
    case DType::f16: return fn(f16{});
  }
}

inline void scaled_basis(const ScaledBasis& p, Runtime& rt) {
  with_dtype(p.dtype, [&](auto s) { scaled_basis_as<decltype(s)>(p, rt); });
}
inline void scaled_basis_backward(const ScaledBasisBackward& p, Runtime& rt) {
  with_dtype(p.dtype, [&](auto s) { scaled_basis_backward_as<decltype(s)>(p, rt); });
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
