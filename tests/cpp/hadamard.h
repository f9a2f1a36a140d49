// The kernels of Hadamard bases against the equations of core/hadamard.h as loops in double: the
// checks that the tests of the CPU and the CUDA kernels share.
#pragma once
#include "core/hadamard.h"
#include "layer.h"

namespace randlora {

struct HadamardCase {
  int64_t r, d, D;  // of the layer
  int64_t T = 3;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  int64_t first_column = 0, columns = 0, first_row = 0, rows = 0;  // a part; 0: all
};

using Signs = std::vector<int8_t>;
inline Signs signs(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  Signs v(count);
  for (int8_t& e : v) e = random() % 2 ? 1 : -1;
  return v;
}

inline double h(int64_t a, int64_t b) { return __builtin_popcountll(a & b) % 2 ? -1 : 1; }

struct HadamardProblem {
  HadamardCase c;
  HadamardSizes sizes;
  int64_t D, d, r, n, K, T, classes, first_class;
  Signs s, row, col;
  Values lam, gam, B;

  explicit HadamardProblem(const HadamardCase& c_)
      : c(c_),
        sizes{c.rows ? c.rows : c.D,
              c.columns ? c.columns : c.d,
              c.r,
              (c.d + c.r - 1) / c.r,
              c.first_row,
              c.first_column},
        D(sizes.D),
        d(sizes.d),
        r(sizes.r),
        n(sizes.n),
        K(sizes.K()),
        T(c.T),
        classes(sizes.classes()),
        first_class(sizes.first_class()),
        s(signs(d, 1)),
        row(signs(D, 2)),
        col(signs(K, 3)),
        lam(normal(K, 4)),
        gam(normal(n * d, 5)),
        B(D * K) {
    for (int64_t o = 0; o < D; ++o)
      for (int64_t k = 0; k < K; ++k) B[o * K + k] = row[o] * h(sizes.first_row + o, k) * col[k];
  }

  int64_t class_of(int64_t k) const { return (sizes.first_column + k) / n; }
  // Where column k of a row is, in a (classes, rows, n) matrix.
  int64_t place(int64_t row_, int64_t rows, int64_t k) const {
    const int64_t m = class_of(k);
    return ((m - first_class) * rows + row_) * n + sizes.first_column + k - m * n;
  }

  // (T, K): sum over m of H[j, m] z[m, t, i]
  Values mixed(const Values& z) const {
    Values v(T * K, 0.0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < classes; ++m)
          v[t * K + k] += h(k / n, first_class + m) * z[(m * T + t) * n + k % n];
    return v;
  }
  // dW (D, d), or (d, D)
  Values delta(double scale, bool transposed) const {
    Values scaled(K * d);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k)
        scaled[c * d + k] = lam[c] * h(c / n, class_of(k)) * s[k] * gam[c % n * d + k];
    return transposed ? product(scaled, B, d, D, K, true, scale, true)
                      : product(B, scaled, D, d, K, false, scale);
  }
};

template <class Kernels>
void set_case_of(const Kernels& kernels, const HadamardProblem& p, DType dtype) {
  set_case("dtype %d r %ld d %ld of %ld D %ld of %ld T %ld skip %ld column %ld row %ld %s",
           int(dtype), long(p.r), long(p.d), long(p.c.d), long(p.D), long(p.c.D), long(p.T),
           long(p.c.skip), long(p.c.first_column), long(p.c.first_row), kernels.settings().c_str());
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

template <class Kernels>
void check_up(Kernels& kernels, const HadamardProblem& p, DType dtype, bool accumulate) {
  const double scale = 0.375;
  const int64_t skip = p.c.skip, behind = Kernels::kBehind;
  const Array z(dtype, normal(p.classes * p.T * p.n, 6), skip, behind),
      lam(compute_of(dtype), p.lam, skip, behind);
  const Array y =
      accumulate ? Array(dtype, normal(p.T * p.D, 7), skip) : Array(dtype, p.T * p.D, skip);
  const Values before = y.values();
  Values v = p.mixed(z.values());
  kernels.hadamard_up({p.sizes, z.get(), lam.get(), p.row.data(), p.col.data(), y.get(), dtype, p.T,
                       scale, accumulate});
  for (int64_t e = 0; e < p.T * p.K; ++e) v[e] *= p.lam[e % p.K];
  const Values want = product(v, p.B, p.T, p.D, p.K, true, scale);
  expect_close("up", dtype, y, accumulate ? sum(want, before) : want);
}

template <class Kernels>
void check_down(Kernels& kernels, const HadamardProblem& p, DType dtype, int64_t slots,
                bool with_z = true) {
  const double scale = 0.75;
  const int64_t skip = p.c.skip, behind = Kernels::kBehind, count = p.classes * p.T * p.n;
  const DType compute = compute_of(dtype);
  const Array y(dtype, normal(p.T * p.D, 8), skip), lam(compute, p.lam, skip, behind);
  const Array z(dtype, normal(count, 9), skip, behind), w(dtype, count, skip, behind),
      sums(compute, slots * p.K, skip);
  const Values mixed = p.mixed(z.values()), u = product(y.values(), p.B, p.T, p.K, p.D, false);
  kernels.hadamard_down({p.sizes, y.get(), lam.get(), p.row.data(), p.col.data(), w.get(),
                         with_z ? z.get() : nullptr, with_z ? sums.get() : nullptr, slots, dtype,
                         p.T, scale});
  Values want(count, 0.0), want_sums(slots * p.K, 0.0);
  for (int64_t m = 0; m < p.classes; ++m)
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t k = 0; k < p.K; ++k)
        want[(m * p.T + t) * p.n + k % p.n] +=
            scale * h(k / p.n, p.first_class + m) * p.lam[k] * u[t * p.K + k];
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t t = q * p.T / slots; t < (q + 1) * p.T / slots; ++t)
      for (int64_t k = 0; k < p.K; ++k)  // without the signs of the columns
        want_sums[q * p.K + k] += p.col[k] * u[t * p.K + k] * mixed[t * p.K + k];
  expect_close("w", dtype, w, want);
  if (with_z) expect_close("sums", compute, sums, want_sums);
}

// What has no tokens: gamma with its signs, and the gradients of lambda and gamma.
template <class Kernels>
void check_diagonals(Kernels& kernels, const HadamardProblem& p, DType dtype) {
  const int64_t skip = p.c.skip, slots = p.T;
  const DType compute = compute_of(dtype);
  const Array gam(compute, p.gam, skip), out(dtype, p.n * p.d, skip);
  kernels.hadamard_gamma({p.sizes, gam.get(), p.s.data(), out.get(), dtype, 0.25});
  Values want = p.gam;
  for (int64_t e = 0; e < p.n * p.d; ++e) want[e] *= 0.25 * p.s[e % p.d];
  expect_close("gamma", dtype, out, want);

  // Places of columns that the part lacks are NaN.
  Values P(p.classes * p.n * p.n, NAN), want_gam = normal(p.n * p.d, 10), want_lam(p.K, 0.0);
  for (int64_t e = 0; e < p.n * p.d; ++e) P[p.place(e / p.d, p.n, e % p.d)] = want_gam[e];
  const Array products(dtype, P, skip), sums(compute, normal(slots * p.K, 11), skip),
      dlam(compute, p.K, skip), dgam(compute, p.n * p.d, skip);
  const Values all = products.values(), of_slots = sums.values();
  kernels.hadamard_diagonals({p.sizes, products.get(), sums.get(), slots, p.s.data(), p.col.data(),
                              dlam.get(), dgam.get(), dtype, 0.5, 3});
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t k = 0; k < p.K; ++k) want_lam[k] += 0.5 * p.col[k] * of_slots[q * p.K + k];
  for (int64_t e = 0; e < p.n * p.d; ++e)
    want_gam[e] = 3.0 * p.s[e % p.d] * all[p.place(e / p.d, p.n, e % p.d)];
  expect_close("dlam", compute, dlam, want_lam);
  expect_close("dgam", compute, dgam, want_gam);
}

template <class Kernels>
void check_weight(Kernels& kernels, const HadamardProblem& p, DType dtype, bool transposed) {
  const double scale = 0.01;
  const int64_t skip = p.c.skip, size = p.D * p.d;
  const Array lam(compute_of(dtype), p.lam, skip, Kernels::kBehind),
      gam(compute_of(dtype), p.gam, skip), base(dtype, normal(size, 12), skip),
      out(dtype, size, skip), merged(dtype, size, skip);
  HadamardWeight call{p.sizes, lam.get(), gam.get(), p.s.data(), p.row.data(), p.col.data(),
                      nullptr, out.get(), dtype,     scale,      transposed};
  kernels.hadamard_weight(call);
  call.base = base.get(), call.out = merged.get();
  kernels.hadamard_weight(call);
  const Values want = p.delta(scale, transposed);
  expect_close("dW", dtype, out, want);
  expect_close("W + dW", dtype, merged, sum(want, base.values()));
  std::memcpy(out.get(), base.get(), base.bytes());
  call.base = call.out = out.get();
  kernels.hadamard_weight(call);
  EXPECT(out.raw() == merged.raw(), "in place,");
}

// Where all sums are exact, stochastic rounding is that of core/stochastic.h, bit for bit.
template <class Kernels>
void check_stochastic(Kernels& kernels, HadamardProblem p, DType dtype, bool transposed) {
  set_case_of(kernels, p, dtype);
  for (double& v : p.lam) v = v > 0 ? 0.5 : -2;
  for (double& v : p.gam) v = v > 0 ? 1 : 0.25;
  const int64_t size = p.D * p.d, skip = p.c.skip;
  const double scale = 1.0 / 1024;
  Values start = normal(size, 13, 4);
  for (double& v : start) v = std::round(v * 256) / 256;
  const Array lam(DType::f32, p.lam, 0, Kernels::kBehind), gam(DType::f32, p.gam),
      base(dtype, start, skip), out(dtype, size, skip);
  kernels.hadamard_weight({p.sizes, lam.get(), gam.get(), p.s.data(), p.row.data(), p.col.data(),
                           base.get(), out.get(), dtype, scale, transposed, true, 99});
  compare_stochastic(out, dtype, sum(base.values(), p.delta(scale, transposed)));
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
    for (const bool transposed : {false, true}) check_weight(kernels, p, dtype, transposed);
  }
}

}  // namespace randlora
