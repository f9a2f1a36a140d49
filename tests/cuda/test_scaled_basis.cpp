// A' and the gradients of lambda and gamma on the card, against plain loops in double; A' also bit
// for bit as the CPU's.
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

void check(const Layer& L, DType dtype, int threads, int64_t skip) {
  TestDevice device(threads);
  CpuKernels cpu(1);
  const auto want = check_scaled_basis(cpu, L, dtype, 0).raw();
  EXPECT(check_scaled_basis(device, L, dtype, skip).raw() == want, "A' is not the CPU's,");
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
}

}  // namespace

int main() { return run_tests(tests, few); }
