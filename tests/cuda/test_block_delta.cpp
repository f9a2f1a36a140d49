// block_delta against plain loops in double.
#include <cmath>

#include "blocks.h"
#include "check.h"
#include "core/stochastic.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"

using namespace randlora;

namespace {

using Case = BlockCase;
using Problem = BlockProblem;

BlockDelta call_of(const Problem& p, const Array& l, const Array& g, const Array* base,
                   const Array& out, DType dtype, double scale, bool transposed) {
  return {p.blocks(), l.get(), g.get(), base ? base->get() : nullptr,
          out.get(),  dtype,   scale,   transposed};
}

constexpr double kScale = 0.7e7;

void run(const Problem& p, DType dtype, bool transposed, const std::vector<double>& dW) {
  const int64_t size = p.D * p.d, skip = p.c.skip;
  TestDevice device;
  const Array lam(compute_of(dtype), p.lam), gam(compute_of(dtype), p.gam),
      base(dtype, random_values(size, 6, 1), skip), out(dtype, size, skip),
      merged(dtype, size, skip);
  const auto start = base.values();
  auto sum = dW;
  for (int64_t e = 0; e < size; ++e) sum[e] += start[e];

  cuda::block_delta(call_of(p, lam, gam, nullptr, out, dtype, kScale, transposed), device);
  cuda::block_delta(call_of(p, lam, gam, &base, merged, dtype, kScale, transposed), device);
  // One rounding of the result, and 16 bits of A' and its sums before it.
  const double half_ulp = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0;
  const double before = dtype == DType::f64 ? 1e-13 : half_ulp != 0 ? 2e-5 : 2e-6;
  double largest = 0;
  for (const double x : dW) largest = std::max(largest, std::fabs(x));
  const auto expect = [&](const char* what, const Array& got, const std::vector<double>& want) {
    const auto values = got.values();
    for (int64_t e = 0; e < size; ++e)
      EXPECT(std::fabs(values[e] - want[e]) <= half_ulp * std::fabs(want[e]) + before * largest,
             "%s[%ld] = %g, not %g: dtype %d transposed %d D %ld d %ld r %ld G %ld skip %ld "
             "chunks %ld %ld",
             what, long(e), values[e], want[e], int(dtype), transposed, long(p.c.D), long(p.c.d),
             long(p.c.r), long(p.c.G), long(skip), long(p.c.a_chunks), long(p.c.b_chunks));
  };
  expect("dW", out, dW);
  expect("W + dW", merged, sum);
  std::memcpy(out.get(), base.get(), base.bytes());
  cuda::block_delta(call_of(p, lam, gam, &out, out, dtype, kScale, transposed), device);
  EXPECT(out.raw() == merged.raw(), "in place, dtype %d", int(dtype));
}

// Where all sums are exact, stochastic rounding is that of core/stochastic.h, bit for bit.
template <class S>
void stochastic(const Case& c, DType dtype, bool transposed) {
  Problem p(c);
  for (double& v : p.lam) v = v > 0 ? 0.5 : -2;
  for (double& v : p.gam) v = v > 0 ? 1 : 0.25;
  const int64_t size = p.D * p.d;
  const double scale = 1.0 / 1024;
  const Array lam(DType::f32, p.lam), gam(DType::f32, p.gam),
      base(dtype, random_values(size, 6, 1), c.skip), out(dtype, size, c.skip);
  TestDevice device;
  BlockDelta call = call_of(p, lam, gam, &base, out, dtype, scale, transposed);
  call.stochastic = true, call.rounding_seed = 99;
  cuda::block_delta(call, device);
  const auto start = base.values(), dW = p.delta(scale, transposed);
  for (int64_t e = 0; e < size; ++e) {
    const S want =
        round_stochastic(float(start[e]) + float(dW[e]), rounding_word(99, uint64_t(e)), S{});
    EXPECT(out.as<S>()[e].bits == want.bits, "stochastic, dtype %d transposed %d skip %ld [%ld]",
           int(dtype), transposed, long(c.skip), long(e));
  }
}

// A NaN in gamma[i, k] reaches column k in the chunks of D that a row (., i) of A' is connected to.
void nonfinite(DType dtype) {
  Problem p({24, 40, 8, 4});  // n = 5: a group's 10 rows are no multiple of 4
  const int64_t i = 2, k = 17;
  p.gam[i * p.d + k] = NAN;
  const Array lam(compute_of(dtype), p.lam), gam(compute_of(dtype), p.gam), out(dtype, p.D * p.d);
  TestDevice device;
  cuda::block_delta(call_of(p, lam, gam, nullptr, out, dtype, 1, false), device);
  const auto got = out.values();
  for (int64_t o = 0; o < p.D; ++o)
    for (int64_t col = 0; col < p.d; ++col) {
      bool reached = false;
      for (int64_t j = 0; j < p.c.r; ++j) reached |= col == k && p.meet(o, j * p.sizes.n + i, k);
      EXPECT(std::isnan(got[o * p.d + col]) == reached, "dtype %d row %ld column %ld", int(dtype),
             long(o), long(col));
    }
}

void tests() {
  const Case cases[] = {{1, 1, 1, 1},
                        {96, 64, 8, 4},
                        {120, 60, 12, 3},
                        {70, 35, 10, 5, 1},   // chunks of 14 and 7, K / G no multiple of G
                        {64, 64, 8, 8},       // one or no term an element
                        {32, 16, 32, 4},      // r > d
                        {8, 4, 16, 4},        // chunks of 2 and 1
                        {280, 272, 8, 2, 3},  // tiles that end early, steps of slots that do
                        {136, 40, 4, 1},
                        {96, 64, 8, 4, 0, 1, 2},          // slices: of d
                        {96, 64, 8, 4, 1, 0, 0, 2, 2},    // of D
                        {160, 72, 16, 8, 0, 3, 2},        // of d within a cycle of chunks of D
                        {160, 72, 16, 8, 0, 3, 3, 5, 2},  // of both
                        {1120, 272, 8, 2, 0, 0, 0, 1, 1}};
  for (const Case& c : cases) {
    const Problem p(c);
    for (const bool transposed : {false, true}) {
      const auto dW = p.delta(kScale, transposed);
      for (const DType dtype : kTypes) run(p, dtype, transposed, dW);
    }
  }
  for (const Case& c : {Case{96, 64, 8, 4}, {96, 64, 8, 4, 1}, {70, 35, 10, 5}})
    for (const bool transposed : {false, true}) {
      stochastic<bf16>(c, DType::bf16, transposed);
      stochastic<f16>(c, DType::f16, transposed);
    }
  for (const DType dtype : kTypes) nonfinite(dtype);
}

}  // namespace

int main() { return run_tests(tests); }
