// b_up_planes and b_down_planes against plain sums in double.
#include "check.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

struct Case {
  int64_t D, d, r, T;
  double density;
  int64_t skip;         // elements that take the alignment of every matrix away
  int multiprocessors;  // many of them: blocks share the contraction of a tile
};

std::vector<double> random_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> v(count);
  for (double& x : v) x = normal(random);
  return v;
}

// The planes in memory of exactly their size.
struct DevicePlanes {
  Poisoned memory;
  Planes view;
  explicit DevicePlanes(const Ternary& B) : memory(int64_t(B.bits.size()) * 8) {
    std::memcpy(memory.get(), B.bits.data(), B.bits.size() * 8);
    const auto* words = static_cast<const uint64_t*>(memory.get());
    view = {words, words + B.bits.size() / 2, B.planes.words};
  }
};

void check(const char* what, const Case& c, DType dtype, bool tf32, const Array& got,
           const std::vector<double>& want) {
  const double error = relative_error(got.values(), want);
  EXPECT(error <= tolerance(dtype, tf32),
         "%s: %.2e for dtype %d tf32 %d D %ld d %ld r %ld T %ld density %.2f skip %ld", what, error,
         int(dtype), tf32, long(c.D), long(c.d), long(c.r), long(c.T), c.density, long(c.skip));
}

void run(const Case& c, DType dtype, bool tf32) {
  ThreadRuntime setup(1);
  const int64_t n = (c.d + c.r - 1) / c.r, K = c.r * n, T = c.T, D = c.D;
  const Ternary B(D, K, c.density, 2, setup);
  const DevicePlanes planes(B);
  Basis basis;
  basis.D = D, basis.d = c.d, basis.r = c.r, basis.n = n, basis.b_planes = planes.view;
  TestDevice device;
  device.tf32 = tf32;
  device.multiprocessors = c.multiprocessors;
  const double scale = 0.7;

  const Array V(dtype, random_values(T * K, 3), c.skip), x(dtype, random_values(T * D, 4), c.skip),
      start(dtype, random_values(T * D, 5), c.skip);
  const auto v = V.values(), xs = x.values(), old = start.values();
  std::vector<double> y(T * D, 0), both(old), U(T * K, 0);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t o = 0; o < D; ++o)
      for (int64_t k = 0; k < K; ++k) {
        y[t * D + o] += scale * B.dense[o * K + k] * v[t * K + k];
        U[t * K + k] += B.dense[o * K + k] * xs[t * D + o];
      }
  for (int64_t i = 0; i < T * D; ++i) both[i] += y[i];

  const cuda::BSide side{basis, dtype, T};
  const Array got_y(dtype, T * D, c.skip), got_U(dtype, T * K, c.skip);
  cuda::b_up_planes(side, V.get(), got_y.get(), scale, false, device);
  check("up", c, dtype, tf32, got_y, y);
  cuda::b_up_planes(side, V.get(), start.get(), scale, true, device);
  check("up, accumulated", c, dtype, tf32, start, both);
  cuda::b_down_planes(side, x.get(), got_U.get(), device);
  check("down", c, dtype, tf32, got_U, U);
}

// A NaN spoils its own token and no other; through FMA, only what B connects it to.
void nonfinite(DType dtype) {
  ThreadRuntime setup(1);
  const int64_t D = 70, K = 66, T = 21, token = 18, k = 5;
  const Ternary B(D, K, 1.0 / 3, 2, setup);
  const DevicePlanes planes(B);
  Basis basis;
  basis.D = D, basis.d = 66, basis.r = 6, basis.n = 11, basis.b_planes = planes.view;
  auto values = random_values(T * K, 3);
  values[token * K + k] = NAN;
  const Array V(dtype, values), y(dtype, T * D);
  TestDevice device;
  cuda::b_up_planes({basis, dtype, T}, V.get(), y.get(), 1, false, device);
  const auto got = y.values();
  const bool exact = bytes_of(dtype) > 2;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t o = 0; o < D; ++o) {
      const bool reached = t == token && (B.dense[o * K + k] != 0 || !exact);
      EXPECT(std::isnan(got[t * D + o]) == reached, "dtype %d token %ld row %ld", int(dtype),
             long(t), long(o));
    }
}

void tests() {
  const Case cases[] = {{1, 1, 1, 1, 1.0, 0, 3},         {64, 64, 8, 17, 1.0 / 3, 0, 1},
                        {33, 20, 7, 5, 0.05, 1, 3},      {130, 65, 16, 33, 1.0 / 3, 0, 60},
                        {48, 16, 32, 130, 1.0, 0, 1},    {300, 96, 4, 16, 1.0 / 3, 0, 100},
                        {200, 136, 136, 70, 0.05, 1, 1}, {260, 130, 2, 130, 1.0 / 3, 0, 1},
                        {40, 40, 8, 0, 1.0, 0, 3}};
  for (const Case& c : cases) {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
      run(c, dtype, false);
    run(c, DType::f32, true);
  }
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) nonfinite(dtype);
}

}  // namespace

int main() { return run_tests(tests); }
