// The kernels of Hadamard bases against the equations of core/hadamard.h as loops in double: the
// checks that the tests of the CPU and the CUDA kernels share.
#pragma once
#include "core/hadamard.h"
#include "layer.h"

namespace randlora {

struct HadamardCase {
  int64_t r, d, D;
  int64_t T = 3;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  int64_t experts = 1;
  bool own = false;  // signs of each expert
};

// -1 and +1, or these times a scale for each feature.
inline std::vector<float> signs(int64_t count, unsigned seed, bool scaled) {
  std::mt19937 random(seed);
  std::vector<float> v(count);
  for (float& e : v) {
    e = random() % 2 ? 1 : -1;
    if (scaled) e *= 0.5f + float(random() % 64) / 64;
  }
  return v;
}

inline double h(int64_t a, int64_t b) { return __builtin_popcountll(a & b) % 2 ? -1 : 1; }

inline HadamardSizes sizes_of(const HadamardCase& c) {
  HadamardSizes sizes;
  sizes.D = c.D;
  sizes.d = c.d;
  sizes.r = c.r;
  sizes.n = (c.d + c.r - 1) / c.r;
  return sizes;
}

struct HadamardProblem {
  HadamardCase c;
  HadamardSizes sizes = sizes_of(c);
  int64_t D = c.D, d = c.d, r = c.r, n = sizes.n, K = sizes.K(), T = c.T, classes = sizes.classes(),
          experts = c.experts;
  // Those of the experts, one behind the other, as lam and gam.
  std::vector<float> a_signs = signs(d * experts, 1, true), row_signs = signs(D * experts, 2, true),
                     col_signs = signs(K, 3, false);
  Values lam = normal(K * experts, 4), gam = normal(n * d * experts, 5), B = B_of(0);

  explicit HadamardProblem(const HadamardCase& c_) : c(c_) {}

  const float* a_signs_of(int64_t e) const { return a_signs.data() + c.own * e * d; }
  const float* row_signs_of(int64_t e) const { return row_signs.data() + c.own * e * D; }
  Values B_of(int64_t e) const {
    Values all(D * K);
    for (int64_t o = 0; o < D; ++o)
      for (int64_t k = 0; k < K; ++k) all[o * K + k] = row_signs_of(e)[o] * h(o, k) * col_signs[k];
    return all;
  }
  void set_operands(HadamardDelta& call, const Array& lam_, const Array& gam_, DType dtype,
                    double scale, bool reduce) const {
    call.sizes = sizes;
    call.experts = experts;
    call.lam = lam_.get();
    call.gam = gam_.get();
    call.a_signs = a_signs.data();
    call.row_signs = row_signs.data();
    call.col_signs = col_signs.data();
    call.next_a_signs = c.own * d;
    call.next_row_signs = c.own * D;
    call.dtype = dtype;
    call.scale = scale;
    call.reduce = reduce;
  }

  // Where column k of a row is, in a (classes, rows, n) matrix.
  int64_t place(int64_t row_, int64_t rows, int64_t k) const {
    return (k / n * rows + row_) * n + k % n;
  }

  // (T, K): sum over m of H[j, m] z[m, t, i]
  Values mixed(const Values& z) const {
    Values v(T * K, 0.0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < classes; ++m)
          v[t * K + k] += h(k / n, m) * z[(m * T + t) * n + k % n];
    return v;
  }
  // dW (D, d), or (d, D), of every expert
  Values deltas(double scale, bool reduce) const {
    Values all;
    for (int64_t e = 0; e < experts; ++e) {
      Values scaled(K * d);
      for (int64_t k = 0; k < d; ++k)
        for (int64_t q = 0; q < K; ++q)
          scaled[q * d + k] =
              lam[e * K + q] * h(q / n, k / n) * a_signs_of(e)[k] * gam[(e * n + q % n) * d + k];
      const Values dW = reduce ? product(scaled, B_of(e), d, D, K, true, scale, true)
                               : product(B_of(e), scaled, D, d, K, false, scale);
      all.insert(all.end(), dW.begin(), dW.end());
    }
    return all;
  }
};

template <class Kernels>
void set_case_of(const Kernels& kernels, const HadamardProblem& p, DType dtype) {
  set_case("dtype %d r %ld d %ld D %ld T %ld skip %ld experts %ld own %d %s", int(dtype), long(p.r),
           long(p.d), long(p.D), long(p.T), long(p.c.skip), long(p.experts), p.c.own,
           kernels.settings().c_str());
}

// Results may differ by one rounding and, before it, by the rounding of sums of about `largest`.
inline void expect_close(const char* what, DType dtype, const Array& got, const Values& want) {
  const double half_ulp = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0;
  double largest = 0;
  for (const double x : want) largest = std::max(largest, std::fabs(x));
  const double before = largest * (dtype == DType::f64 ? 1e-13 : 2e-6);
  const Values values = got.values();
  for (size_t e = 0; e < want.size(); ++e)
    if (!(std::fabs(values[e] - want[e]) <= half_ulp * std::fabs(want[e]) + before)) {
      EXPECT(false, "%s[%zu] = %g, not %g,", what, e, values[e], want[e]);
      return;
    }
}

// gamma with its signs, and lambda times the signs of the columns, which only the kernels read.
struct Prepared {
  Array gam, factors;
};
template <class Kernels>
Prepared prepared(Kernels& kernels, const HadamardProblem& p, DType dtype) {
  const int64_t skip = p.c.skip, count = p.n * p.d;
  const DType compute = compute_dtype(dtype);
  const Array lam(compute, Values(p.lam.begin(), p.lam.begin() + p.K), skip),
      gam(compute, Values(p.gam.begin(), p.gam.begin() + count), skip);
  Prepared made{Array(class_dtype(dtype), count, skip), Array(compute, p.sizes.room_of_factors())};
  HadamardSignedDiagonals call{};
  call.sizes = p.sizes;
  call.gam = gam.get();
  call.a_signs = p.a_signs.data();
  call.signed_gam = made.gam.get();
  call.lam = lam.get();
  call.col_signs = p.col_signs.data();
  call.factors = made.factors.get();
  call.dtype = dtype;
  kernels.hadamard_signed_diagonals(call);
  return made;
}

template <class Kernels>
void check_up(Kernels& kernels, const HadamardProblem& p, DType dtype, bool accumulate) {
  const double scale = 0.375;
  const int64_t skip = p.c.skip, behind = Kernels::kBehind;
  const Array z(class_dtype(dtype), normal(p.classes * p.T * p.n, 6), skip, behind);
  const Array y =
      accumulate ? Array(dtype, normal(p.T * p.D, 7), skip) : Array(dtype, p.T * p.D, skip);
  const Values before = y.values();
  Values v = p.mixed(z.values());
  const Prepared ready = prepared(kernels, p, dtype);
  HadamardUp call{};
  call.sizes = p.sizes;
  call.z = z.get();
  call.factors = ready.factors.get();
  call.row_signs = p.row_signs.data();
  call.y = y.get();
  call.dtype = dtype;
  call.T = p.T;
  call.scale = scale;
  call.accumulate = accumulate;
  kernels.hadamard_up(call);
  for (int64_t e = 0; e < p.T * p.K; ++e) v[e] *= p.lam[e % p.K];
  const Values want = product(v, p.B, p.T, p.D, p.K, true, scale);
  expect_close("up", dtype, y, accumulate ? sum(want, before) : want);
}

template <class Kernels>
void check_down(Kernels& kernels, const HadamardProblem& p, DType dtype, int64_t slots,
                bool with_z = true) {
  const int64_t skip = p.c.skip, behind = Kernels::kBehind, count = p.classes * p.T * p.n;
  const DType compute = compute_dtype(dtype), between = class_dtype(dtype);
  const Array y(dtype, normal(p.T * p.D, 8), skip);
  const Array z(between, normal(count, 9), skip, behind), w(between, count, skip, behind),
      sums(compute, slots * p.K, skip);
  const Values mixed = p.mixed(z.values()), u = product(y.values(), p.B, p.T, p.K, p.D, false);
  const Prepared ready = prepared(kernels, p, dtype);
  HadamardDown call{};
  call.sizes = p.sizes;
  call.y = y.get();
  call.factors = ready.factors.get();
  call.row_signs = p.row_signs.data();
  call.w = w.get();
  if (with_z) {
    call.z = z.get();
    call.sums = sums.get();
  }
  call.slots = slots;
  call.dtype = dtype;
  call.T = p.T;
  kernels.hadamard_down(call);
  Values want(count, 0.0), want_sums(slots * p.K, 0.0);
  for (int64_t m = 0; m < p.classes; ++m)
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t k = 0; k < p.K; ++k)
        want[(m * p.T + t) * p.n + k % p.n] += h(k / p.n, m) * p.lam[k] * u[t * p.K + k];
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t t = q * p.T / slots; t < (q + 1) * p.T / slots; ++t)
      for (int64_t k = 0; k < p.K; ++k)  // without the signs of the columns
        want_sums[q * p.K + k] += p.col_signs[k] * u[t * p.K + k] * mixed[t * p.K + k];
  expect_close("w", between, w, want);
  if (with_z) expect_close("sums", compute, sums, want_sums);
}

// What has no tokens: gamma with its signs, and the gradients of lambda and gamma.
template <class Kernels>
void check_diagonals(Kernels& kernels, const HadamardProblem& p, DType dtype) {
  const int64_t skip = p.c.skip, slots = p.T;
  const DType compute = compute_dtype(dtype), between = class_dtype(dtype);
  Values want(p.gam.begin(), p.gam.begin() + p.n * p.d);
  for (int64_t e = 0; e < p.n * p.d; ++e) want[e] *= p.a_signs[e % p.d];
  expect_close("gamma", between, prepared(kernels, p, dtype).gam, want);

  // Places of columns from d on are NaN.
  Values P(p.classes * p.n * p.n, NAN), want_gam = normal(p.n * p.d, 10), want_lam(p.K, 0.0);
  for (int64_t e = 0; e < p.n * p.d; ++e) P[p.place(e / p.d, p.n, e % p.d)] = want_gam[e];
  const Array products(between, P, skip), sums(compute, normal(slots * p.K, 11), skip),
      dlam(compute, p.K, skip), dgam(compute, p.n * p.d, skip);
  const Values all = products.values(), of_slots = sums.values();
  HadamardDiagonalGradients call{};
  call.sizes = p.sizes;
  call.class_gradient = products.get();
  call.sums = sums.get();
  call.slots = slots;
  call.a_signs = p.a_signs.data();
  call.col_signs = p.col_signs.data();
  call.dlam = dlam.get();
  call.dgam = dgam.get();
  call.dtype = dtype;
  call.scale = 0.5;
  kernels.hadamard_diagonal_gradients(call);
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t k = 0; k < p.K; ++k) want_lam[k] += 0.5 * p.col_signs[k] * of_slots[q * p.K + k];
  for (int64_t e = 0; e < p.n * p.d; ++e)
    want_gam[e] = 0.5 * p.a_signs[e % p.d] * all[p.place(e / p.d, p.n, e % p.d)];
  expect_close("dlam", compute, dlam, want_lam);
  expect_close("dgam", compute, dgam, want_gam);
}

template <class Kernels>
void check_weight(Kernels& kernels, const HadamardProblem& p, DType dtype, bool reduce) {
  const double scale = 0.01;
  const int64_t skip = p.c.skip, size = p.experts * p.D * p.d;
  const Array lam(compute_dtype(dtype), p.lam, skip, Kernels::kBehind),
      gam(compute_dtype(dtype), p.gam, skip), base(dtype, normal(size, 12), skip),
      out(dtype, size, skip), merged(dtype, size, skip);
  HadamardWeight call{};
  p.set_operands(call, lam, gam, dtype, scale, reduce);
  call.out = out.get();
  kernels.hadamard_weight(call);
  call.weight = base.get(), call.out = merged.get();
  kernels.hadamard_weight(call);
  const Values want = p.deltas(scale, reduce);
  expect_close("dW", dtype, out, want);
  expect_close("W + dW", dtype, merged, sum(want, base.values()));
  std::memcpy(out.get(), base.get(), base.bytes());
  call.weight = call.out = out.get();
  kernels.hadamard_weight(call);
  EXPECT(out.raw() == merged.raw(), "in place,");
}

template <class Kernels>
void check_weight_backward(Kernels& kernels, const HadamardProblem& p, DType dtype, bool reduce) {
  const DType compute = compute_dtype(dtype);
  const int64_t skip = p.c.skip, each = p.D * p.d;
  const Array lam(compute, p.lam, skip), gam(compute, p.gam, skip),
      grad(dtype, normal(p.experts * each, 13), skip), dlam(compute, p.experts * p.K, skip),
      dgam(compute, p.experts * p.n * p.d, skip);
  HadamardWeightBackward call{};
  p.set_operands(call, lam, gam, dtype, 0.5, reduce);
  call.weight = grad.get();
  call.dlam = dlam.get();
  call.dgam = dgam.get();
  kernels.hadamard_weight_backward(call);
  const Values of = grad.values();
  Values want_lam(p.experts * p.K, 0.0), want_gam(p.experts * p.n * p.d, 0.0);
  for (int64_t e = 0; e < p.experts; ++e) {
    const Values one(of.begin() + e * each, of.begin() + (e + 1) * each);
    const Values u = product(one, p.B_of(e), p.d, p.K, p.D, false, 0.5, !reduce);
    for (int64_t k = 0; k < p.d; ++k)
      for (int64_t c = 0; c < p.K; ++c) {
        const double x = u[k * p.K + c] * h(c / p.n, k / p.n) * p.a_signs_of(e)[k];
        const int64_t at = (e * p.n + c % p.n) * p.d + k;
        want_lam[e * p.K + c] += x * p.gam[at];
        want_gam[at] += x * p.lam[e * p.K + c];
      }
  }
  expect_close("dlam", compute, dlam, want_lam);
  expect_close("dgam", compute, dgam, want_gam);
}

// Every `step`-th dtype from `first` on.
template <class Kernels>
void check_products(Kernels& kernels, const HadamardCase& c, size_t first = 0, size_t step = 1) {
  const HadamardProblem p(c);
  for (size_t i = first; i < std::size(kTypes); i += step) {
    const DType dtype = kTypes[i];
    set_case_of(kernels, p, dtype);
    for (const bool accumulate : {false, true}) check_up(kernels, p, dtype, accumulate);
    for (const int64_t slots : {1, 2, 5}) check_down(kernels, p, dtype, slots);
    check_down(kernels, p, dtype, 2, false);
  }
}
template <class Kernels>
void check_weights(Kernels& kernels, const HadamardCase& c, size_t first = 0, size_t step = 1) {
  const HadamardProblem p(c);
  for (size_t i = first; i < std::size(kTypes); i += step) {
    const DType dtype = kTypes[i];
    set_case_of(kernels, p, dtype);
    check_diagonals(kernels, p, dtype);
    for (const bool reduce : {false, true}) {
      check_weight(kernels, p, dtype, reduce);
      check_weight_backward(kernels, p, dtype, reduce);
    }
  }
}

}  // namespace randlora
