// What dense bases need around torch's GEMMs.
#pragma once
#include "../core/operators.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

// A'[j * n + i, k] = lam[j, i] * A[j, k] * gam[i, k] and its gradients: PEFT's UniqueBaseGrad. Each
// way takes one pass over the (K, d) matrix, without temporaries of that size.
template <class S>
void scaled_basis_as(const ScaledBasis& p, Runtime& rt) {
  using C = ComputeOf<S>;
  const C *A = static_cast<const C*>(p.A), *lam = static_cast<const C*>(p.lam),
          *gam = static_cast<const C*>(p.gam);
  S* out = static_cast<S*>(p.out);
  const int64_t d = p.d;
  rt.split(p.r * p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t j = c / p.n, i = c % p.n;
      const C *a = A + j * d, *g = gam + i * d, l = lam[c];
      S* row = out + c * d;
      for (int64_t k = 0; k < d; ++k) narrow(l * a[k] * g[k], row + k);
    }
  });
}

template <class S>
void scaled_basis_backward_as(const ScaledBasisBackward& p, Runtime& rt) {
  using C = ComputeOf<S>;
  using Vector = Vec<C>;
  constexpr int kLanes = kVectorBytes / int(sizeof(C));
  const C *A = static_cast<const C*>(p.A), *lam = static_cast<const C*>(p.lam),
          *gam = static_cast<const C*>(p.gam);
  const S* grad = static_cast<const S*>(p.grad);
  C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
  const int64_t d = p.d;
  // A copy owns a row of dgam and a column of dlam, and reads each of its rows of grad once.
  rt.split(p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      __builtin_memset(dgam + i * d, 0, size_t(d) * sizeof(C));
      for (int64_t j = 0; j < p.r; ++j) {
        const int64_t c = j * p.n + i;
        const S* G = grad + c * d;
        const C *a = A + j * d, *g = gam + i * d, l = lam[c];
        C* dg = dgam + i * d;
        Vector sum{};
        C rest = 0;
        int64_t k = 0;
        for (; k + kLanes <= d; k += kLanes) {
          const Vector GA = load_as<Vector>(G + k) * load<Vector>(a + k);
          sum += GA * load<Vector>(g + k);
          store(dg + k, load<Vector>(dg + k) + GA * l);
        }
        for (; k < d; ++k) {
          const C GA = widen(G[k]) * a[k];
          rest += GA * g[k];
          dg[k] += GA * l;
        }
        for (int q = 0; q < kLanes; ++q) rest += sum[q];
        dlam[c] = rest;
      }
    }
  });
}

RANDLORA_BY_DTYPE(scaled_basis, ScaledBasis)
RANDLORA_BY_DTYPE(scaled_basis_backward, ScaledBasisBackward)

}  // namespace randlora::RANDLORA_ISA
