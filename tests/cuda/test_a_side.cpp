// Up, down and gradient of the A side against plain sums in double.
#include "cuda/kernels.h"
#include "factored.h"
#include "run_tests.h"

using namespace randlora;

namespace {

struct Case {
  int64_t d, r, T;
  double density;
  bool wide;
  int64_t skip = 0;            // elements that take the alignment of every matrix away
  int64_t shared = 227 << 10;  // of a block
  int multiprocessors = 3;
  int64_t chunk_bytes = 64 << 20;
};

struct Run {
  const Case& c;
  DType dtype;
  bool tf32;
  Factored f;
  TestDevice device;
  double scale = 0.7;
  Array lam, gam;
  std::vector<double> scaled;

  Run(const Case& c_, DType dtype_, bool tf32_)
      : c(c_),
        dtype(dtype_),
        tf32(tf32_),
        f(1, c.d, c.r, c.density, c.wide),
        lam(compute_of(dtype), normal_values(f.K, 1)),
        gam(compute_of(dtype), normal_values(f.n * c.d, 2)),
        scaled(f.scaled(lam.values(), gam.values())) {
    device.tf32 = tf32, device.shared_bytes = c.shared, device.multiprocessors = c.multiprocessors;
    device.chunk_bytes = c.chunk_bytes;
  }
  cuda::ASide side() const { return {f.basis, lam.get(), gam.get(), dtype, c.T}; }
  void compare(const char* what, const Array& got, const std::vector<double>& want, double bound) {
    const double error = relative_error(got.values(), want);
    EXPECT(error <= bound,
           "%s: %.2e for dtype %d tf32 %d d %ld r %ld T %ld density %.2f wide %d skip %ld", what,
           error, int(dtype), tf32, long(c.d), long(c.r), long(c.T), c.density, c.wide,
           long(c.skip));
  }
};

void check(const Case& c, DType dtype, bool tf32 = false) {
  Run run(c, dtype, tf32);
  const int64_t T = c.T, d = c.d, K = run.f.K, n = run.f.n;
  const double bound = tolerance(dtype, tf32);
  const Array z(dtype, normal_values(T * d, 3), c.skip), U(dtype, normal_values(T * K, 4), c.skip),
      start(dtype, normal_values(T * d, 5), c.skip), V(dtype, T * K, c.skip),
      out(dtype, T * d, c.skip);
  const auto zs = z.values(), us = U.values();

  cuda::a_up(run.side(), z.get(), V.get(), run.scale, run.device);
  run.compare("V", V, product(zs, run.scaled, T, K, d, true, run.scale), bound);

  const auto want = product(us, run.scaled, T, d, K, false, run.scale);
  cuda::a_down(run.side(), U.get(), out.get(), run.scale, false, run.device);
  run.compare("out", out, want, bound);
  const auto old = start.values();
  cuda::a_down(run.side(), U.get(), start.get(), run.scale, true, run.device);
  run.compare("out + out", start, sum(old, want), bound);

  const auto P = product(us, zs, K, d, T, false, run.scale, true);
  const auto l = run.lam.values(), g = run.gam.values();
  std::vector<double> dlam(K, 0.0), dgam(n * d, 0.0);
  for (int64_t col = 0; col < K; ++col)
    for (int64_t k = 0; k < d; ++k) {
      const double AP = run.f.A.dense[col / n * d + k] * P[col * d + k];
      dlam[col] += AP * g[col % n * d + k];
      dgam[col % n * d + k] += AP * l[col];
    }
  const Array got_dlam(compute_of(dtype), K), got_dgam(compute_of(dtype), n * d);
  cuda::a_grad(run.side(), U.get(), z.get(), run.scale, got_dlam.get(), got_dgam.get(), run.device);
  // No rounding but of sums: U and z are exact.
  const double exact = tf32 ? bound : tolerance(compute_of(dtype));
  run.compare("dlam", got_dlam, dlam, exact);
  run.compare("dgam", got_dgam, dgam, exact);

  // The same bits with tables that the basis brings along.
  const AnyLists& a = run.f.basis.a;
  const Poisoned tables(support_numbers(a.count, c.r, d) * 4);
  run.f.basis.a_tables = static_cast<const int32_t*>(tables.get());
  cuda::support_tables(a, c.wide, c.r, d, static_cast<int32_t*>(tables.get()), run.device);
  const Array V2(dtype, T * K, c.skip), out2(dtype, T * d, c.skip), dlam2(compute_of(dtype), K),
      dgam2(compute_of(dtype), n * d);
  cuda::a_up(run.side(), z.get(), V2.get(), run.scale, run.device);
  cuda::a_down(run.side(), U.get(), out2.get(), run.scale, false, run.device);
  cuda::a_grad(run.side(), U.get(), z.get(), run.scale, dlam2.get(), dgam2.get(), run.device);
  EXPECT(V2.raw() == V.raw() && out2.raw() == out.raw() && dlam2.raw() == got_dlam.raw() &&
             dgam2.raw() == got_dgam.raw(),
         "tables change results: dtype %d d %ld r %ld T %ld", int(dtype), long(d), long(c.r),
         long(T));
}

// NaN and infinity reach the outputs that A connects them to, and no others.
void not_finite() {
  for (const DType dtype : kTypes)
    for (const int64_t T : {3, 40}) {
      const Case c{45, 4, T, 0.15, false};
      Run run(c, dtype, false);
      const int64_t d = c.d, K = run.f.K, n = run.f.n, bad_t = 2, bad_k = 7, bad_c = 2 * n + 1;
      auto zs = normal_values(T * d, 3), us = normal_values(T * K, 4);
      zs[bad_t * d + bad_k] = NAN, us[bad_t * K + bad_c] = INFINITY;
      const Array z(dtype, zs), U(dtype, us), V(dtype, T * K), out(dtype, T * d);
      const auto connected = [&](int64_t j, int64_t k) { return run.f.A.dense[j * d + k] != 0; };

      cuda::a_up(run.side(), z.get(), V.get(), run.scale, run.device);
      cuda::a_down(run.side(), U.get(), out.get(), run.scale, false, run.device);
      const auto v = V.values(), o = out.values();
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t col = 0; col < K; ++col)
          EXPECT(std::isfinite(v[t * K + col]) == !(t == bad_t && connected(col / n, bad_k)),
                 "V[%ld, %ld] dtype %d T %ld", long(t), long(col), int(dtype), long(T));
        for (int64_t k = 0; k < d; ++k)
          EXPECT(std::isfinite(o[t * d + k]) == !(t == bad_t && connected(bad_c / n, k)),
                 "out[%ld, %ld] dtype %d T %ld", long(t), long(k), int(dtype), long(T));
      }
      const Array clean(dtype, normal_values(T * d, 3));
      const Array dlam(compute_of(dtype), K), dgam(compute_of(dtype), n * d);
      cuda::a_grad(run.side(), U.get(), clean.get(), run.scale, dlam.get(), dgam.get(), run.device);
      const auto l = dlam.values(), g = dgam.values();
      for (int64_t col = 0; col < K; ++col)
        EXPECT(std::isfinite(l[col]) == (col != bad_c), "dlam[%ld] dtype %d T %ld", long(col),
               int(dtype), long(T));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < d; ++k)
          EXPECT(std::isfinite(g[i * d + k]) == !(i == bad_c % n && connected(bad_c / n, k)),
                 "dgam[%ld, %ld] dtype %d T %ld", long(i), long(k), int(dtype), long(T));
    }
}

// The same bits in whatever order blocks and threads run.
void deterministic() {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t T : {2, 150}) {
      const Case c{70, 3, T, 0.3, false, 0, 227 << 10, 40};
      Run run(c, dtype, false);
      const int64_t K = run.f.K, n = run.f.n;
      const Array z(dtype, normal_values(T * c.d, 3)), U(dtype, normal_values(T * K, 4));
      EXPECT(cuda_on_cpu::same_bits_under_all_schedules([&] {
               const Array V(dtype, T * K), out(dtype, T * c.d), dlam(compute_of(dtype), K),
                   dgam(compute_of(dtype), n * c.d);
               cuda::a_up(run.side(), z.get(), V.get(), 1, run.device);
               cuda::a_down(run.side(), U.get(), out.get(), 1, false, run.device);
               cuda::a_grad(run.side(), U.get(), z.get(), 1, dlam.get(), dgam.get(), run.device);
               std::vector<unsigned char> all;
               for (const Array* a : {&V, &out, &dlam, &dgam}) {
                 const auto raw = a->raw();
                 all.insert(all.end(), raw.begin(), raw.end());
               }
               return all;
             }),
             "schedules change the result: dtype %d T %ld", int(dtype), long(T));
    }
}

void tests() {
  const int64_t small = 99 << 10;  // the least that a supported card has
  const Case cases[] = {
      // d, r, T, density, wide, skip, shared, multiprocessors
      {1, 1, 1, 1.0, false},                        // everything is one
      {33, 8, 5, 0.05, true},                       // empty rows of A
      {33, 8, 1, 0.05, true},                       // one token
      {64, 8, 0, 1.0 / 3, false},                   // no tokens
      {64, 8, 17, 1.0 / 3, false},                  // n = 8: aligned rows of V
      {64, 8, 17, 1.0 / 3, false, 1},               // the same matrices, unaligned
      {30, 64, 9, 1.0 / 3, true},                   // r > d, n = 1
      {40, 5, 3, 0.0, false},                       // A is zero
      {65, 1, 130, 1.0, true, 0, small},            // n = 65: more than a tile of bases
      {200, 6, 33, 0.05, false},                    // n = 34
      {150, 2, 40, 1.0 / 3, false, 3, small},       // n = 75, odd
      {272, 2, 16, 0.02, false},                    // few tokens, n = 136
      {272, 2, 150, 0.3, false, 0, small, 1},       // large tiles, ranges of columns
      {200, 1, 40, 1.0, false, 0, small, 1},        // more entries than a chunk of a_down
      {200, 1, 20, 1.0, true, 1, small, 1},         // the same in its small tile
      {160, 8, 140, 1.0, false, 0, 227 << 10, 50},  // many SMs: small tiles, split tokens
      {48, 3, 600, 0.3, false, 0, 227 << 10, 50},   // splits of the gradient
      {48, 3, 900, 0.3, true, 0, 227 << 10, 50, 384 * 48 * 2 * 4},  // and z in parts
  };
  for (const Case& c : cases)
    for (const DType dtype : kTypes) {
      check(c, dtype);
      if (dtype == DType::f32) check(c, dtype, true);
    }
  not_finite();
  deterministic();
}

}  // namespace

int main() { return run_tests(tests); }
