// A' and the gradients of lambda and gamma on the card, against the CPU kernels (A' bit for bit) and
// plain loops in double.
#include <cmath>
#include <random>

#include "check.h"
#include "cpu/dispatch.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

struct Problem {
  int64_t r, n, d;
  std::vector<double> A, lam, gam, grad;

  Problem(int64_t r_, int64_t d_, int64_t n_, double density) : r(r_), n(n_), d(d_) {
    ThreadRuntime rt(1);
    A = Ternary(r, d, density, 1, rt).dense;
    for (double& a : A) a *= 1.75;
    std::mt19937 random(unsigned(r * 100 + d));
    std::normal_distribution<double> normal;
    for (auto [v, count] : {std::pair{&lam, r * n}, {&gam, n * d}, {&grad, r * n * d}}) {
      v->resize(count);
      for (double& e : *v) e = normal(random);
    }
  }
};

// `skip` elements before every matrix take its alignment away.
void run(const Problem& p, DType dtype, int threads, int64_t skip) {
  const DType compute = compute_of(dtype);
  const int64_t K = p.r * p.n;
  TestDevice device;
  device.max_threads = threads;
  ThreadRuntime rt(1);
  const Array A(compute, p.A, skip), lam(compute, p.lam, skip), gam(compute, p.gam, skip);
  const Array grad(dtype, p.grad, skip), out(dtype, K * p.d, skip), want(dtype, K * p.d);
  const char* where = "r %ld n %ld d %ld dtype %d threads %d skip %ld";
  char name[128];
  std::snprintf(name, sizeof name, where, long(p.r), long(p.n), long(p.d), int(dtype), threads,
                long(skip));

  ScaledBasis forward{p.r, p.n, p.d, A.get(), lam.get(), gam.get(), out.get(), dtype};
  cuda::scaled_basis(forward, device);
  forward.out = want.get();
  cpu_kernels().scaled_basis(forward, rt);
  EXPECT(out.raw() == want.raw(), "A': %s", name);

  const Array dlam(compute, K, skip), dgam(compute, p.n * p.d, skip);
  cuda::scaled_basis_backward(
      {p.r, p.n, p.d, A.get(), lam.get(), gam.get(), grad.get(), dlam.get(), dgam.get(), dtype},
      device);
  const auto a = A.values(), l = lam.values(), g = gam.values(), G = grad.values();
  std::vector<double> want_dlam(K, 0.0), want_dgam(p.n * p.d, 0.0);
  for (int64_t c = 0; c < K; ++c)
    for (int64_t k = 0; k < p.d; ++k) {
      const int64_t j = c / p.n, of_gam = c % p.n * p.d + k;
      const double GA = G[c * p.d + k] * a[j * p.d + k];
      want_dlam[c] += GA * g[of_gam];
      want_dgam[of_gam] += GA * l[c];
    }
  // Sums in the compute type of exactly the numbers that the loops read.
  const double bound = tolerance(compute);
  EXPECT(relative_error(dlam.values(), want_dlam) < bound, "dlam %.2e: %s",
         relative_error(dlam.values(), want_dlam), name);
  EXPECT(relative_error(dgam.values(), want_dgam) < bound, "dgam %.2e: %s",
         relative_error(dgam.values(), want_dgam), name);
}

// A and gamma are dense factors: a zero times infinity is NaN, as on the CPU, and it stays in the
// rows and columns that it belongs to.
void not_finite() {
  Problem p(5, 70, 3, 1.0);
  p.A[0] = 0, p.gam[0] = INFINITY;
  for (DType dtype : kTypes) {
    const DType compute = compute_of(dtype);
    TestDevice device;
    const Array A(compute, p.A), lam(compute, p.lam), gam(compute, p.gam), grad(dtype, p.grad);
    const Array out(dtype, 15 * 70), dlam(compute, 15), dgam(compute, 3 * 70);
    cuda::scaled_basis({5, 3, 70, A.get(), lam.get(), gam.get(), out.get(), dtype}, device);
    cuda::scaled_basis_backward(
        {5, 3, 70, A.get(), lam.get(), gam.get(), grad.get(), dlam.get(), dgam.get(), dtype},
        device);
    const auto values = out.values(), of_lam = dlam.values(), of_gam = dgam.values();
    for (int64_t e = 0; e < 15 * 70; ++e) {
      const int64_t c = e / 70, k = e % 70;
      EXPECT(c == 0 && k == 0       ? std::isnan(values[e])
             : c % 3 == 0 && k == 0 ? std::isinf(values[e])
                                    : std::isfinite(values[e]),
             "A'[%ld, %ld] = %g", long(c), long(k), values[e]);
    }
    for (int64_t c = 0; c < 15; ++c)
      EXPECT(c % 3 == 0 ? !std::isfinite(of_lam[c]) : std::isfinite(of_lam[c]), "dlam[%ld] = %g",
             long(c), of_lam[c]);
    for (double v : of_gam) EXPECT(std::isfinite(v), "dgam %g", v);
  }
}

void schedules() {
  const Problem p(74, 600, 5, 1.0 / 3);
  const bool same = cuda_on_cpu::same_bits_under_all_schedules([&] {
    TestDevice device;
    device.max_threads = 64;
    const Array A(DType::f32, p.A), lam(DType::f32, p.lam), gam(DType::f32, p.gam);
    const Array grad(DType::bf16, p.grad), dlam(DType::f32, p.r * p.n), dgam(DType::f32, p.n * p.d);
    cuda::scaled_basis_backward({p.r, p.n, p.d, A.get(), lam.get(), gam.get(), grad.get(),
                                 dlam.get(), dgam.get(), DType::bf16},
                                device);
    auto all = dlam.raw();
    const auto more = dgam.raw();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  });
  EXPECT(same, "the order of threads shows");
}

void tests() {
  struct Shape {
    int64_t r, d, n;
  };
  // r > d, d not divisible by r, n = 1, r over 32 (two batches), d over a warp's columns (parts).
  for (Shape s : {Shape{1, 1, 1},
                  {4, 16, 4},
                  {16, 8, 1},
                  {5, 33, 7},
                  {3, 130, 44},
                  {40, 64, 2},
                  {70, 264, 4},
                  {33, 513, 16},
                  {8, 64, 8}})
    for (double density : {0.05, 1.0 / 3, 1.0}) {
      const Problem p(s.r, s.d, s.n, density);
      for (DType dtype : kTypes) {
        run(p, dtype, density == 1 ? 32 : 128, 0);
        run(p, dtype, 64, 1);
      }
    }
  not_finite();
  schedules();
}

}  // namespace

int main() { return run_tests(tests); }
