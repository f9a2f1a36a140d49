// Balanced bases: generation and bit planes as on the CPU, bit for bit; dW from the planes that a
// balanced B has. The products are in test_linear.cpp.
#include "balanced_b.h"
#include "cuda/kernels.h"
#include "factored.h"
#include "run_tests.h"

using namespace randlora;

namespace {

struct Case {
  int64_t lines, r, q, n;
  bool wide = false;
  int64_t line_start = 0;
  uint32_t role = 1;
};

void same_as_on_the_cpu(const Case& c) {
  TestDevice device;
  const BalancedB want(c.lines, c.r, c.q, c.n, c.wide, true, c.line_start, c.role);
  const BalancedB got(c.lines, c.r, c.q, c.n, c.wide, false, c.line_start, c.role);
  cuda::fill_balanced(got.fill, device);
  EXPECT(got.raw() == want.raw(), "lines %ld r %ld q %ld n %ld wide %d", long(c.lines), long(c.r),
         long(c.q), long(c.n), c.wide);

  const int64_t count = c.lines * words_of(c.r * c.n);
  const Poisoned planes(2 * count * 8);
  std::vector<uint64_t> of_cpu(2 * count, ~uint64_t{0});
  ThreadRuntime rt(1);
  auto* plus = static_cast<uint64_t*>(planes.get());
  cuda::balanced_to_planes(got.view(), c.lines, c.r, c.n, plus, plus + count, device);
  balanced_to_planes(want.view(), c.lines, c.r, c.n, of_cpu.data(), of_cpu.data() + count, rt);
  add_to_digest(plus, 2 * count * 8);
  EXPECT(count == 0 || !std::memcmp(plus, of_cpu.data(), 2 * count * 8),
         "planes: lines %ld r %ld q %ld n %ld", long(c.lines), long(c.r), long(c.q), long(c.n));
}

void delta(DType dtype, bool transposed) {
  const int64_t D = 50, r = 6;
  const Factored f(D, 33, r, 0.4);
  const BalancedB b(D, r, 2, f.n, f.wide);
  const int64_t count = D * words_of(f.K);
  std::vector<uint64_t> words(2 * count);
  ThreadRuntime rt(1);
  balanced_to_planes(b.view(), D, r, f.n, words.data(), words.data() + count, rt);
  Basis balanced = f.basis, planes = f.basis;
  balanced.b_rows = balanced.b_cols = planes.b_rows = planes.b_cols = {};
  balanced.b_balanced = b.view();
  planes.b_planes = {words.data(), words.data() + count, words_of(f.K)};

  const DType compute = compute_of(dtype);
  const Array lam(compute, normal_values(f.K, 1)), gam(compute, normal_values(f.n * f.d, 2)),
      grad(dtype, normal_values(D * f.d, 3));
  TestDevice device;
  std::vector<unsigned char> results[2];
  for (const bool decoded : {false, true}) {
    const Basis& basis = decoded ? planes : balanced;
    const Array dW(dtype, D * f.d), dlam(compute, f.K), dgam(compute, f.n * f.d);
    cuda::delta_weight(
        {basis, lam.get(), gam.get(), nullptr, dW.get(), dtype, 0.5, transposed, false, 0}, device);
    cuda::delta_weight_backward(
        {basis, lam.get(), gam.get(), grad.get(), dtype, 0.5, transposed, dlam.get(), dgam.get()},
        device);
    for (const Array* a : {&dW, &dlam, &dgam}) {
      const auto raw = a->raw();
      results[decoded].insert(results[decoded].end(), raw.begin(), raw.end());
    }
  }
  EXPECT(results[0] == results[1], "dW of dtype %d transposed %d", int(dtype), transposed);
}

void tests() {
  const Case cases[] = {
      // lines, r, q, n, wide, line_start, role
      {1, 1, 1, 1},
      {130, 8, 1, 5, false, 7},
      {130, 8, 8, 33, true},                // every group in every line
      {97, 3, 2, 1, false, 1000000, 0},     // A
      {257, 32, 4, 128},                    // a block has more lines than threads
      {40, 32, 2, 129, true, 4294967256u},  // five words of signs, up to the last line there is
      {3, 70, 9, 2},                        // r no multiple of four
      {0, 4, 2, 8},                         // no lines
  };
  for (const Case& c : cases) same_as_on_the_cpu(c);
  for (const DType dtype : kTypes)
    for (const bool transposed : {false, true}) delta(dtype, transposed);
}

}  // namespace

int main() { return run_tests(tests); }
