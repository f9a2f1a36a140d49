// The operators on Hadamard bases (docs/basis-spec.md, section 14) as plain structs.
//
//   H[a, b] = -1 if a & b has an odd number of ones, else +1
//   A[j, k] = a_signs[k] H[j, m]                      m = k / n, the class of column k
//   B[o, c] = row_signs[o] H[o, c] col_signs[c]       c = j * n + i
//
// The signs are float32. Those of the layer's input side (a_signs if d is that side, else
// row_signs) are -1 or +1 times the adapter's input scale, the others -1 or +1. A product with A is
// one small matrix product for each class, which torch's GEMM computes
// (torch/hadamard/class_products.h). The structs here are what surrounds these products. Between
// the two:
//
//   z[m, t, i] = sum over the columns k of class m of a_signs[k] gam[i, k] x[t, k]
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
  // Numbers that `factors` of HadamardSignedDiagonals has room for: K of them in whole groups.
  RANDLORA_HD_MEMBER int64_t room_of_factors() const { return (K() + 31) / 32 * 32; }
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
//   signed_gam[i, k] = a_signs[k] * gam[i, k]
//   factors = lam[c] * col_signs[c] for all c, in the order in which hadamard_up and hadamard_down
//             of the same device read them
struct HadamardSignedDiagonals {
  HadamardSizes sizes;
  const void* gam;  // (n, d) in the compute type
  const float* a_signs;
  void* signed_gam;  // (n, d) in the class dtype of `dtype`
  const void* lam;   // (r, n) in the compute type
  const float* col_signs;
  void* factors;  // sizes.room_of_factors() in the compute type, at a multiple of 16 bytes
  DType dtype;
};

// dlam[c] = scale * col_signs[c] * the sum over slots q of sums[q, c].
struct HadamardSlotSums {
  HadamardSizes sizes;
  const void* sums;  // (slots, K) in the compute type
  int64_t slots;
  const float* col_signs;
  void* dlam;  // compute type
  DType dtype;
  double scale;
};

// dlam from the sums of HadamardDown, and
// dgam[i, k] = scale * a_signs[k] * class_gradient[m, i, k'], with column k at place k' of its
// class m. Places of columns from d on are never read.
struct HadamardDiagonalGradients : HadamardSlotSums {
  const void* class_gradient;  // from the class products, (classes, n, n) in the class dtype
  const float* a_signs;
  void* dgam;  // compute type
};

// y[t, o] += scale * row_signs[o] * sum over c of H[o, c] v[c],
// or y = ... unless `accumulate`, with
//   v[j * n + i] = factors[j * n + i] * sum over m of H[j, m] z[m, t, i]
struct HadamardUp {
  HadamardSizes sizes;
  const void* z;        // (classes, T, n) in the class dtype
  const void* factors;  // from HadamardSignedDiagonals
  const float* row_signs;
  void* y;  // (T, D) in `dtype`
  DType dtype;
  int64_t T;
  double scale;
  bool accumulate;
};

// From y (T, D):
//   u[t, c] = sum over o of row_signs[o] H[o, c] y[t, o]
//   w[m, t, i] = sum over j of H[j, m] factors[j * n + i] u[t, j * n + i]
// and, if z is not null, for the tokens t of each slot q:
//   sums[q, j * n + i] = sum over t of u[t, j * n + i] * sum over m of H[j, m] z[m, t, i]
struct HadamardDown {
  HadamardSizes sizes;
  const void* y;
  const void* factors;  // from HadamardSignedDiagonals
  const float* row_signs;
  void* w;        // (classes, T, n) in the class dtype
  const void* z;  // likewise, or null
  void* sums;     // (slots, K) in the compute type
  int64_t slots;  // slot q has the tokens from q * T / slots to (q + 1) * T / slots
  DType dtype;
  int64_t T;
};

// y[t, k] += scale * from[m, t, k'], or y = ... unless `accumulate`, with column k at place k' of
// its class m. CPU only: torch's GEMM copies a result whose rows are not contiguous.
struct HadamardAdd {
  HadamardSizes sizes;
  const void* from;  // (classes, T, n) in the class dtype
  void* y;           // (T, d)
  DType dtype;
  int64_t T;
  double scale;
  bool accumulate;
};

// dW of a layer, or of experts that share col_signs and the sizes. The experts' matrices lie one
// behind the other, and so do their a_signs and row_signs, so many numbers apart, or 0 if all have
// the same.
struct HadamardDelta {
  HadamardSizes sizes;
  int64_t experts;
  const void *lam, *gam;  // compute type
  const float *a_signs, *row_signs, *col_signs;
  int64_t next_a_signs, next_row_signs;
  const void* weight;  // in `dtype`: what dW is added to, or null; or the gradient of the sum
  DType dtype;
  double scale;
  bool reduce;  // in > out: weight and dW are (d, D) instead of (D, d)

  RANDLORA_HD_MEMBER HadamardDelta expert(int64_t e) const {
    HadamardDelta p = *this;
    p.experts = 1;
    p.lam = moved(lam, e * sizes.K(), compute_dtype(dtype));
    p.gam = moved(gam, e * sizes.n * sizes.d, compute_dtype(dtype));
    p.weight = moved(weight, e * sizes.D * sizes.d, dtype);
    p.a_signs += e * next_a_signs;
    p.row_signs += e * next_row_signs;
    return p;
  }
};

// out = weight + scale * dW, or scale * dW without a weight, rounded once to `dtype`.
struct HadamardWeight : HadamardDelta {
  void* out;

  RANDLORA_HD_MEMBER HadamardWeight expert(int64_t e) const {
    HadamardWeight p = *this;
    static_cast<HadamardDelta&>(p) = HadamardDelta::expert(e);
    p.out = moved(out, e * sizes.D * sizes.d, dtype);
    return p;
  }
};

// dlam and dgam from the gradient of HadamardWeight's out: with c = j * n + i,
// u[c] = sum over o of row_signs[o] H[o, c] grad[o, k] and m the class of column k,
//   dgam[i, k] = scale * a_signs[k] * sum over j of H[j, m] lam[j, i] col_signs[c] u[c]
//   dlam[j, i] = scale * col_signs[c] * sum over k of H[j, m] a_signs[k] gam[i, k] u[c]
struct HadamardWeightBackward : HadamardDelta {
  void *dlam, *dgam;  // compute type

  RANDLORA_HD_MEMBER HadamardWeightBackward expert(int64_t e) const {
    HadamardWeightBackward p = *this;
    static_cast<HadamardDelta&>(p) = HadamardDelta::expert(e);
    p.dlam = moved(dlam, e * sizes.K(), compute_dtype(dtype));
    p.dgam = moved(dgam, e * sizes.n * sizes.d, compute_dtype(dtype));
    return p;
  }
};

}  // namespace randlora
