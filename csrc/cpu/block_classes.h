// The A side of block bases by classes of columns (docs/basis-spec.md, section 14). The n columns k
// of class m have A[j, k] = s_k H[j, m] with the Hadamard matrix H, so the q rank indices of a
// group share the inner sums:
//
//   V[j, i] = lam[j, i] * sum over m of H[j, m] * (sum over k in class m of s_k gam[i, k] x[k])
//
// The inner sums are r products of n x n matrices, 1 / q of the work of dense blocks of A'. torch's
// GEMM computes them (csrc/torch/block_classes.cpp). This file does the rest, log2 q additions per
// element.
#pragma once
#include "../core/operators.h"
#include "simd.h"

namespace randlora {
namespace RANDLORA_ISA {

template <class C>
void sign_columns_as(const SignColumns& p, Runtime& rt) {
  const C* in = static_cast<const C*>(p.in);
  C* out = static_cast<C*>(p.out);
  rt.split(p.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t first = 0; first < p.d; first += p.w) {
        const int8_t* signs = p.a + first * p.q;
        for (int64_t k = 0; k < p.w; ++k) {
          const int64_t e = i * p.d + first + k;
          out[e] = in[e] * (C(p.scale) * C(signs[k]));
        }
      }
  });
}

// Transforms the q rows of one group and base, which are `step` elements apart.
template <class C>
RANDLORA_INLINE void mix_rows(const HadamardMix& p, int64_t j, int64_t i) {
  const int64_t step = p.n * p.stride, first = (j * p.n + i) * p.stride;
  const C* in = static_cast<const C*>(p.in) + first;
  C* out = static_cast<C*>(p.out) + first;
  const C *before = static_cast<const C*>(p.before), *after = static_cast<const C*>(p.after);
  for (int64_t m = 0; m < p.q; ++m) {
    const C factor = before ? before[(j + m) * p.n + i] : C(1);
    for (int64_t t = 0; t < p.T; ++t) out[m * step + t] = factor * in[m * step + t];
  }
  for (int64_t half = 1; half < p.q; half *= 2)
    for (int64_t m = 0; m < p.q; ++m) {
      if (m & half) continue;
      C *a = out + m * step, *b = out + (m + half) * step;
      for (int64_t t = 0; t < p.T; ++t) {
        const C sum = a[t] + b[t], difference = a[t] - b[t];
        a[t] = sum;
        b[t] = difference;
      }
    }
  if (!after) return;
  for (int64_t m = 0; m < p.q; ++m) {
    const C factor = after[(j + m) * p.n + i];
    for (int64_t t = 0; t < p.T; ++t) out[m * step + t] *= factor;
  }
}

template <class C>
void hadamard_mix_as(const HadamardMix& p, Runtime& rt) {
  rt.split(p.r / p.q * p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) mix_rows<C>(p, e / p.n * p.q, e % p.n);
  });
}

template <class C>
void row_dots_as(const RowDots& p, Runtime& rt) {
  using V = Vec<C>;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const C *a = static_cast<const C*>(p.a), *b = static_cast<const C*>(p.b);
  C* out = static_cast<C*>(p.out);
  rt.split(p.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const C *u = a + c * p.stride, *v = b + c * p.stride;
      V sums{};
      C rest = 0;
      int64_t t = 0;
      for (; t + L <= p.T; t += L) sums += load<V>(u + t) * load<V>(v + t);
      for (; t < p.T; ++t) rest += u[t] * v[t];
      for (int l = 0; l < L; ++l) rest += sums[l];
      out[c] += C(p.scale) * rest;
    }
  });
}

inline void sign_columns(const SignColumns& p, Runtime& rt) {
  p.dtype == DType::f64 ? sign_columns_as<double>(p, rt) : sign_columns_as<float>(p, rt);
}
inline void hadamard_mix(const HadamardMix& p, Runtime& rt) {
  p.dtype == DType::f64 ? hadamard_mix_as<double>(p, rt) : hadamard_mix_as<float>(p, rt);
}
inline void row_dots(const RowDots& p, Runtime& rt) {
  p.dtype == DType::f64 ? row_dots_as<double>(p, rt) : row_dots_as<float>(p, rt);
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
