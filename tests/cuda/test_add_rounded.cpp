// add_rounded against the CPU kernel, bit for bit.
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

// Sums of every size: subnormal, as usual, and too large for float16.
std::vector<double> values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> exponent(-26, 17);
  std::vector<double> v(count);
  for (double& x : v) x = std::ldexp(normal(random), exponent(random));
  return v;
}

// `skip` elements before every matrix, and `delta_skip` before delta, take its alignment away.
void run(DType dtype, int64_t count, int64_t skip, int64_t delta_skip, bool stochastic) {
  const Array delta(DType::f32, values(count, 1), delta_skip), base(dtype, values(count, 2), skip);
  for (const void* from :
       {static_cast<const void*>(nullptr), static_cast<const void*>(base.get())}) {
    const Array out(dtype, count, skip), want(dtype, count);
    AddRounded call{count, from, delta.as<float>(), out.get(), dtype, stochastic, 0x123456789abcu};
    TestDevice().add_rounded(call);
    call.out = want.get();
    CpuKernels(1).add_rounded(call);
    EXPECT(out.raw() == want.raw(), "dtype %d count %ld skip %ld, %ld stochastic %d base %d",
           int(dtype), long(count), long(skip), long(delta_skip), stochastic, from != nullptr);
  }
}

void tests() {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const int64_t count : {0, 1, 7, 8, 9, 1023, 1024, 1029, 5000})
      for (const auto& [skip, delta_skip] : {std::pair{0, 0}, {1, 0}, {0, 1}, {4, 4}})
        for (const bool stochastic : {false, true}) run(dtype, count, skip, delta_skip, stochastic);
}

}  // namespace

int main() { return run_tests(tests); }
