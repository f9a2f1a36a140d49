// A' and the gradients of lambda and gamma on the card, against plain loops in double; A' also bit
// for bit as the CPU's.
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

void check(const Layer& L, DType dtype, int threads, int64_t skip) {
  TestDevice device;
  device.max_threads = threads;
  CpuKernels cpu(1);
  const auto want = check_scaled_basis(cpu, L, dtype, 0).raw();
  EXPECT(check_scaled_basis(device, L, dtype, skip).raw() == want, "A' is not the CPU's,");
}

// A and gamma are dense factors: a zero times infinity is NaN, as on the CPU, and it stays in the
// rows and columns that it belongs to.
void not_finite(DType dtype) {
  const int64_t r = 5, n = 3, d = 70, K = r * n;
  Values As(r * d, 1.75), gams = normal(n * d, 2);
  As[0] = 0, gams[0] = INFINITY;
  const DType compute = compute_of(dtype);
  TestDevice device;
  const Array A(compute, As), lam(compute, normal(K, 1)), gam(compute, gams),
      grad(dtype, normal(K * d, 3)), out(dtype, K * d), dlam(compute, K), dgam(compute, n * d);
  device.scaled_basis({r, n, d, A.get(), lam.get(), gam.get(), out.get(), dtype});
  device.scaled_basis_backward(
      {r, n, d, A.get(), lam.get(), gam.get(), grad.get(), dlam.get(), dgam.get(), dtype});
  const Values values = out.values(), of_lam = dlam.values();
  for (int64_t e = 0; e < K * d; ++e)
    EXPECT(e == 0                         ? std::isnan(values[e])
           : e / d % n == 0 && e % d == 0 ? std::isinf(values[e])
                                          : std::isfinite(values[e]),
           "A'[%ld, %ld] = %g", long(e / d), long(e % d), values[e]);
  for (int64_t c = 0; c < K; ++c)
    EXPECT(std::isfinite(of_lam[c]) == (c % n != 0), "dlam[%ld] = %g", long(c), of_lam[c]);
  for (const double v : dgam.values()) EXPECT(std::isfinite(v), "dgam %g", v);
}

void few() { check(Layer(1, 600, 74, 1.0 / 3), DType::bf16, 64, 0); }

void tests() {
  struct Shape {
    int64_t r, d;
  };
  // r > d, d not divisible by r, n = 1, r over 32 (two batches), d over a warp's columns (parts).
  for (const Shape s :
       {Shape{1, 1}, {4, 16}, {16, 8}, {5, 33}, {3, 130}, {40, 64}, {70, 264}, {33, 513}, {8, 64}})
    for (const DType dtype : kTypes) {
      const Layer L(1, s.d, s.r, 1.0 / 3);
      check(L, dtype, s.d % 2 ? 32 : 128, 0);
      check(L, dtype, 64, 1);
    }
  for (const DType dtype : kTypes) not_finite(dtype);
}

}  // namespace

int main() { return run_tests(tests, few); }
