// The operators on Hadamard bases (docs/basis-spec.md, section 14) as plain structs.
//
//   H[a, b] = -1 if a & b has an odd number of ones, else +1
//   A[j, k] = s[k] H[j, m]                m = k / n, the class of column k
//   B[o, c] = row[o] H[o, c] col[c]       c = j * n + i
//
// s, row and col are float32: -1 or +1, and on the layer's input side (s if d is that side, else
// row) times the adapter's input scale. A product with A is one small matrix product for each
// class, which torch's GEMM computes. The structs here are what surrounds these products. Between
// the two:
//
//   z[m, t, i] = sum over the columns k of class m of s[k] gam[i, k] x[t, k]
//   w[m, t, i] = the same numbers on the way back, from the D side
//
// Both are stored class by class, (classes, T, n), in the class dtype.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace randlora {

// The dtype of z, w and of the class products: that of the activations, but float32 for float16,
// whose range is too small for them.
template <class S>
using ClassOf = std::conditional_t<std::is_same_v<S, f16>, float, S>;
RANDLORA_HD DType class_dtype(DType t) { return t == DType::f16 ? DType::f32 : t; }

struct HadamardSizes {
  int64_t D, d, r, n;

  RANDLORA_HD_MEMBER int64_t K() const { return r * n; }
  RANDLORA_HD_MEMBER int64_t classes() const { return (d + n - 1) / n; }
  // Numbers that HadamardGamma's `factors` has room for: K of them in whole groups.
  RANDLORA_HD_MEMBER int64_t factors() const { return (K() + 31) / 32 * 32; }
  RANDLORA_HD_MEMBER static int64_t power_of_two(int64_t least) {
    int64_t p = 1;
    while (p < least) p *= 2;
    return p;
  }
  // Sizes of the transforms over the rank indices and over the columns of B. The bits of a row
  // above those of N - 1 meet no column, so row o of H equals row o mod N for any D: products
  // with B add up the rows of y with equal o mod N before the transform, or use its result for all
  // of them.
  RANDLORA_HD_MEMBER int64_t R() const { return power_of_two(r); }
  RANDLORA_HD_MEMBER int64_t N() const { return power_of_two(K()); }
};

RANDLORA_HD bool hadamard_minus(int64_t a, int64_t b) {
  uint64_t ones = uint64_t(a & b);
  for (int shift = 32; shift != 0; shift >>= 1) ones ^= ones >> shift;
  return ones & 1;
}

// What a call does once for all its tokens:
//   out[i, k] = s[k] * gam[i, k], unless `out` is null: then x has the signs (HadamardSigned)
//   factors = lam[c] * col[c] for all c, in the order in which hadamard_up and hadamard_down of the
//             same device read them
struct HadamardGamma {
  HadamardSizes sizes;
  const void* gam;  // (n, d) in the compute type
  const float* s;
  void* out;        // (n, d) in the class dtype of `dtype`
  const void* lam;  // (r, n) in the compute type
  const float* col;
  void* factors;  // sizes.factors() in the compute type, at a multiple of 16 bytes
  DType dtype;
};

// dgam[i, k] = scale * s[k] * P[m, i, k'], with column k at place k' of its class m; without s[k]
// if `s` is null, because P comes from HadamardSigned. The class
// products give P (classes, n, n) in the class dtype; places of columns from d on are never read.
// dlam[c] = scale * col[c] * the sum over slots q of sums[q, c].
struct HadamardDiagonals {
  HadamardSizes sizes;
  const void* P;     // may be null, and then dgam is not wanted
  const void* sums;  // (slots, K) in the compute type, from HadamardDown
  int64_t slots;
  const float *s, *col;
  void *dlam, *dgam;  // compute type
  DType dtype;
  double scale;
  int64_t experts = 1;  // CUDA, without P: as many sums and dlam, one behind the other
};

// y[t, o] += scale * row[o] * sum over c of H[o, c] v[c], or y = ... unless `accumulate`, with
//   v[j * n + i] = col lam[j, i] * sum over m of H[j, m] z[m, t, i]
struct HadamardUp {
  HadamardSizes sizes;
  const void* z;        // (classes, T, n) in the class dtype
  const void* factors;  // col lam, from HadamardGamma
  const float* row;
  void* y;  // (T, D) in `dtype`
  DType dtype;
  int64_t T;
  double scale;
  bool accumulate;
};

// From y (T, D):
//   u[t, c] = sum over o of row[o] H[o, c] y[t, o]
//   w[m, t, i] = sum over j of H[j, m] col lam[j, i] u[t, j * n + i]
// and, if z is not null, for the tokens t of each slot q:
//   sums[q, j * n + i] = sum over t of u[t, j * n + i] * sum over m of H[j, m] z[m, t, i]
struct HadamardDown {
  HadamardSizes sizes;
  const void* y;
  const void* factors;  // col lam, from HadamardGamma
  const float* row;
  void* w;        // (classes, T, n) in the class dtype
  const void* z;  // likewise, or null
  void* sums;     // (slots, K) in the compute type
  int64_t slots;  // slot q has the tokens from q * T / slots to (q + 1) * T / slots
  DType dtype;
  int64_t T;
};

// out[t, k] = s[k] * x[t, k]. CPU only, for products with gam itself: of few tokens, x has fewer
// numbers than gam.
struct HadamardSigned {
  HadamardSizes sizes;
  const void* x;  // (T, d) in `dtype`
  const float* s;
  void* out;  // (T, d) in the class dtype
  DType dtype;
  int64_t T;
};

// y[t, k] += scale * s[k] * from[m, t, k'], or y = ... unless `accumulate`, with column k at place
// k' of its class m. CPU only: torch's GEMM copies a result whose rows are not contiguous.
struct HadamardAdd {
  HadamardSizes sizes;
  const void* from;  // (classes, T, n) in the class dtype
  const float* s;
  void* y;  // (T, d)
  DType dtype;
  int64_t T;
  double scale;
  bool accumulate;
};

// Experts that share the signs col and the sizes: their matrices lie one behind the other, and
// those of s and row too, `next_s` and `next_row` numbers apart, or 0 if all have the same.
struct HadamardExperts {
  HadamardSizes sizes;
  int64_t experts;
  const void *lam, *gam;  // compute type
  const float *s, *row, *col;
  int64_t next_s, next_row;
  const void* weight;  // in `dtype`: what dW is added to, or null; or the gradient of the sum
  DType dtype;
  double scale;
  bool transposed;  // weight and dW are (d, D) instead of (D, d)

  RANDLORA_HD_MEMBER HadamardExperts expert(int64_t e) const {
    HadamardExperts p = *this;
    p.experts = 1;
    p.lam = moved(lam, e * sizes.K(), compute_dtype(dtype));
    p.gam = moved(gam, e * sizes.n * sizes.d, compute_dtype(dtype));
    p.weight = moved(weight, e * sizes.D * sizes.d, dtype);
    p.s += e * next_s, p.row += e * next_row;
    return p;
  }
};

// out = weight + scale * dW, or scale * dW without a weight, rounded once to `dtype`.
struct HadamardWeight : HadamardExperts {
  void* out;

  RANDLORA_HD_MEMBER HadamardWeight expert(int64_t e) const {
    return {HadamardExperts::expert(e), moved(out, e * sizes.D * sizes.d, dtype)};
  }
};

// dlam and dgam from the gradient of HadamardWeight's out:
// with u[c] = sum over o of row[o] H[o, c] grad[o, k] and m the class of column k,
//   dgam[i, k] = scale * s[k] * sum over j of H[j, m] col lam[j, i] u[j * n + i]
//   dlam[j, i] = scale * col * sum over k of H[j, m] s[k] gam[i, k] u[j * n + i]
struct HadamardWeightBackward : HadamardExperts {
  void *dlam, *dgam;  // compute type

  RANDLORA_HD_MEMBER HadamardWeightBackward expert(int64_t e) const {
    return {HadamardExperts::expert(e), moved(dlam, e * sizes.K(), compute_dtype(dtype)),
            moved(dgam, e * sizes.n * sizes.d, compute_dtype(dtype))};
  }
};

}  // namespace randlora
