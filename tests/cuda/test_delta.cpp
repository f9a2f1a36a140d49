// dW and its adjoint, from lists (delta_lists*.cu) and from planes (delta_planes*.cu,
// delta_codes.cu), against plain sums in double.
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

void check(const Layer& L, const Basis& basis, DType dtype, bool transposed, int64_t skip,
           TestDevice& device) {
  const DType sums = device.tf32 ? dtype : compute_of(dtype);  // 16-bit gradients widen exactly
  check_delta(device, L, basis, dtype, transposed, skip, tolerance(dtype, device.tf32),
              tolerance(sums, device.tf32));
  if (!device.tf32 && dtype != DType::f64)
    check_stochastic(device, L, basis, dtype, transposed, skip);
}

// The setting of each case takes turns, at periods that have nothing in common with those of dtype
// and orientation.
void lists() {
  // r > d; d not divisible by r; n = 1; supports of over 96 and rows of over 32 entries; none.
  const Layer layers[] = {
      {1, 1, 1, 1},          {33, 20, 32, 1.0 / 3},       {40, 40, 8, 0.05},
      {70, 33, 8, 0.3, 0.1}, {48, 16, 16, 0.2, 0.3},      {64, 64, 64, 0.1, 0.05},
      {260, 130, 4, 1, 0.3}, {300, 136, 33, 0.05},        {65, 65, 7, 0, 0.1},
      {65, 65, 7, 0.1, 0},   {600, 96, 32, 1.0 / 3, 0.05}};
  int number = 0;
  for (const Layer& L : layers)
    for (const DType dtype : kTypes) {
      ++number;
      TestDevice device;
      device.shared_bytes = number % 13 < 4 ? 6 << 10 : 227 << 10;
      device.max_threads = number % 5 == 0 ? 64 : number % 11 == 0 ? 32 : 128;
      const bool wide = number % 7 < 3, transposed = number / 4 % 2 == number % 2;
      check(L, L.basis(Form::lists, wide), dtype, transposed, number % 9 < 4, device);
    }
}

void planes() {
  struct Case {
    int64_t D, d, r;
    double density;
    int64_t skip = 0;
    bool wide = false;
  };
  int number = 0;
  for (const Case& c : {Case{1, 1, 1, 1.0},
                        {40, 40, 8, 1.0 / 3},
                        {70, 33, 7, 0.05, 1},
                        {50, 24, 32, 1.0},  // rows of dW aligned, of dW^T not
                        {160, 140, 2, 1.0 / 3, 0, true},
                        {264, 136, 6, 1.0 / 3},
                        {130, 65, 16, 0.05, 1, true}}) {
    Layer L(c.D, c.d, c.r, c.density);
    // As they are in training: products of lambda and gamma are far below float16's range.
    for (double& v : L.lam) v = float(v * 1e-4);
    for (double& v : L.gam) v = float(v * 1e-3);
    L.scale = 0.7e7;
    for (const bool transposed : {false, true})
      for (const auto [dtype, tf32] : products(number++, cuda_on_cpu::kThreadSanitizer ? 1 : 3)) {
        TestDevice device;
        device.tf32 = tf32;
        check(L, L.basis(Form::planes, c.wide), dtype, transposed, c.skip, device);
      }
  }
}

void few() {
  const Layer L(80, 72, 8, 0.3, 0.2);
  TestDevice device;
  device.shared_bytes = 8 << 10;
  for (const bool transposed : {false, true})
    check(L, L.basis(Form::lists), DType::bf16, transposed, 0, device);
}

void tests() {
  lists();
  planes();
}

}  // namespace

int main() { return run_tests(tests, few); }
