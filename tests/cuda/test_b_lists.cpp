// b_up_lists and b_down_lists against plain sums in double.
#include "cuda/kernels.h"
#include "factored.h"
#include "run_tests.h"

using namespace randlora;

namespace {

struct Case {
  int64_t D, d, r, T;
  double density;
  bool wide;
  int64_t skip = 0;            // elements that take the alignment of every matrix away
  int64_t shared = 227 << 10;  // of a block
  int multiprocessors = 3;
};

void check(const Case& c, DType dtype) {
  const Factored f(c.D, c.d, c.r, c.density, c.wide);
  const int64_t T = c.T, D = c.D, K = f.K;
  TestDevice device;
  device.shared_bytes = c.shared, device.multiprocessors = c.multiprocessors;
  const double scale = 0.7;
  const Array V(dtype, normal_values(T * K, 3), c.skip), x(dtype, normal_values(T * D, 4), c.skip),
      start(dtype, normal_values(T * D, 5), c.skip), y(dtype, T * D, c.skip),
      U(dtype, T * K, c.skip);
  const auto compare = [&](const char* what, const Array& got, const std::vector<double>& want) {
    const double error = relative_error(got.values(), want);
    EXPECT(error <= tolerance(dtype),
           "%s: %.2e for dtype %d D %ld d %ld r %ld T %ld density %.2f wide %d skip %ld shared %ld",
           what, error, int(dtype), long(D), long(c.d), long(c.r), long(T), c.density, c.wide,
           long(c.skip), long(c.shared));
  };
  const cuda::BSide side{f.basis, dtype, T};
  const auto want = product(V.values(), f.B.dense, T, D, K, true, scale);
  cuda::b_up_lists(side, V.get(), y.get(), scale, false, device);
  compare("y", y, want);
  const auto old = start.values();
  cuda::b_up_lists(side, V.get(), start.get(), scale, true, device);
  compare("y + y", start, sum(old, want));
  cuda::b_down_lists(side, x.get(), U.get(), device);
  compare("U", U, product(x.values(), f.B.dense, T, K, D, false));
}

// NaN and infinity reach the outputs that B connects them to, and no others.
void not_finite() {
  for (const DType dtype : kTypes)
    for (const int64_t T : {1, 3, 20}) {
      const Factored f(60, 45, 4, 0.15);
      TestDevice device;
      auto values = normal_values(T * f.K, 3);
      const int64_t bad = (T - 1) * f.K + 7;
      values[bad] = INFINITY;
      const Array V(dtype, values), y(dtype, T * f.D);
      cuda::b_up_lists({f.basis, dtype, T}, V.get(), y.get(), 1, false, device);
      const auto got = y.values();
      for (int64_t t = 0; t < T; ++t)
        for (int64_t o = 0; o < f.D; ++o)
          EXPECT(std::isfinite(got[t * f.D + o]) != (t == T - 1 && f.B.dense[o * f.K + 7] != 0),
                 "y[%ld, %ld] dtype %d T %ld", long(t), long(o), int(dtype), long(T));
    }
}

void deterministic() {
  const Factored f(130, 70, 8, 0.2);
  for (const int64_t T : {1, 5, 37}) {
    const Array x(DType::bf16, normal_values(T * f.D, 3));
    EXPECT(cuda_on_cpu::same_bits_under_all_schedules([&] {
             TestDevice device;
             const Array U(DType::bf16, T * f.K);
             cuda::b_down_lists({f.basis, DType::bf16, T}, x.get(), U.get(), device);
             return U.raw();
           }),
           "schedules change the result: T %ld", long(T));
  }
}

void tests() {
  const Case cases[] = {
      // D, d, r, T, density, wide, skip, shared, multiprocessors
      {1, 1, 1, 1, 1.0, false},                         // everything is one
      {70, 33, 8, 1, 1.0 / 3, true},                    // one token
      {40, 40, 8, 0, 1.0 / 3, false},                   // no tokens
      {33, 20, 32, 5, 0.05, false},                     // r > d; empty lines
      {64, 64, 64, 17, 1.0 / 3, true},                  // n = 1
      {40, 30, 4, 9, 0.0, false},                       // B is zero
      {300, 130, 7, 33, 1.0, false},                    // longer than what is fetched ahead
      {300, 130, 7, 8, 1.0 / 3, false, 1},              // unaligned
      {130, 130, 1, 130, 0.05, false, 3},               // many tiles
      {530, 100, 8, 40, 0.05, false, 0, 99 << 10, 20},  // ranges of lines
      {300, 100, 8, 40, 0.1, false, 0, 6 << 10},        // no room for 16 tokens,
      {300, 100, 8, 40, 0.1, true, 0, 3 << 10, 40},     // nor for 8: panels
      {300, 100, 8, 40, 0.1, false, 0, 3 << 10, 40},
  };
  for (const Case& c : cases)
    for (const DType dtype : kTypes) check(c, dtype);
  not_finite();
  deterministic();
}

}  // namespace

int main() { return run_tests(tests); }
