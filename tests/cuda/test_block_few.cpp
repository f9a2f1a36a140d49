// block_linear, the products for a few tokens, against plain loops in double.
#include "blocks.h"
#include "check.h"
#include "cuda/kernels.h"
#include "run_tests.h"

using namespace randlora;

namespace {

void run(const BlockProblem& p, const std::vector<double>& dW, DType dtype, int64_t T, bool expand,
         bool accumulate) {
  const int64_t in = expand ? p.d : p.D, out = expand ? p.D : p.d, skip = p.c.skip;
  const double scale = 0.7e7;
  const Array lam(compute_of(dtype), p.lam, skip), gam(compute_of(dtype), p.gam, skip),
      x(dtype, random_values(T * in, 6, 1), skip);
  const Array y =
      accumulate ? Array(dtype, random_values(T * out, 7, 1), skip) : Array(dtype, T * out, skip);
  const auto from = x.values();
  auto want = accumulate ? y.values() : std::vector<double>(T * out, 0.0);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t k = 0; k < in; ++k)
        want[t * out + o] += scale * from[t * in + k] * (expand ? dW[o * in + k] : dW[k * out + o]);
  TestDevice device;
  cuda::block_linear(
      {p.blocks(), lam.get(), gam.get(), x.get(), y.get(), dtype, T, scale, expand, accumulate},
      device);
  // Nothing but y is rounded to 16 bits.
  const double bound = dtype == DType::f64    ? 1e-14
                       : dtype == DType::f32  ? 1e-6
                       : dtype == DType::bf16 ? 2.5e-3
                                              : 3e-4;
  const double error = relative_error(y.values(), want);
  EXPECT(error <= bound,
         "%.2e for dtype %d T %ld expand %d accumulate %d D %ld d %ld r %ld G %ld skip %ld "
         "chunks %ld %ld",
         error, int(dtype), long(T), expand, accumulate, long(p.c.D), long(p.c.d), long(p.c.r),
         long(p.c.G), long(skip), long(p.c.a_chunks), long(p.c.b_chunks));
}

void tests() {
  for (const BlockCase& c : {BlockCase{1, 1, 1, 1},
                             {96, 64, 8, 4},
                             {120, 60, 12, 3},
                             {70, 35, 10, 5, 1},  // chunks of 14 and 7, K / G no multiple of G
                             {32, 16, 32, 4},     // r > d
                             {8, 4, 16, 4},       // chunks of 2 and 1
                             {640, 528, 8, 2},    // several accesses a lane
                             {280, 272, 8, 2, 3},
                             {96, 64, 8, 4, 0, 1, 2},        // slices: of d
                             {96, 64, 8, 4, 1, 0, 0, 2, 2},  // of D
                             {160, 72, 16, 8, 0, 3, 2},      // of d within a cycle of chunks of D
                             {160, 72, 16, 8, 0, 3, 3, 5, 2}}) {  // of both
    const BlockProblem p(c);
    const auto dW = p.delta(1, false);
    for (const DType dtype : kTypes)
      for (const int64_t T : {1, 4, 5})
        for (const bool expand : {false, true}) run(p, dW, dtype, T, expand, T == 5);
    run(p, dW, DType::bf16, 16, true, true);
    run(p, dW, DType::bf16, 0, true, true);
  }
}

}  // namespace

int main() { return run_tests(tests); }
