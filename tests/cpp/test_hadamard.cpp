// The kernels of Hadamard bases of the set that RANDLORA_ISA names: odd shapes, every
// dtype, one thread and three. Exits 77 if the set cannot run.
#include "hadamard.h"

using namespace randlora;

namespace {

// The CPU's alone: class by class to rows.
void check_add(CpuKernels& kernels, const HadamardProblem& p, DType dtype, bool accumulate) {
  set_case_of(kernels, p, dtype);
  const Array z(class_dtype(dtype), normal(p.classes * p.T * p.n, 6), 0, kernels.kBehind),
      y(dtype, normal(p.T * p.d, 7));
  const Values from = z.values(), before = y.values();
  cpu_kernels().hadamard_add({p.sizes, z.get(), y.get(), dtype, p.T, 0.5, accumulate},
                             kernels.runtime);
  Values want(p.T * p.d);
  for (int64_t e = 0; e < p.T * p.d; ++e)
    want[e] = 0.5 * from[p.place(e / p.d, p.T, e % p.d)] + (accumulate ? before[e] : 0);
  expect_close("add", dtype, y, want);
}

}  // namespace

int main() {
  if (!kernels_can_run()) return 77;
  const HadamardCase cases[] = {{1, 1, 1},   {4, 1, 9},     {8, 64, 64},
                                {7, 61, 96}, {3, 10, 11},   {60, 50, 50},  // r > d
                                {2, 33, 70}, {32, 70, 150}, {32, 260, 330}};
  for (const int threads : {1, 3})
    for (HadamardCase c : cases) {
      CpuKernels kernels(threads);
      check_weights(kernels, c);
      for (c.T = 0; c.T <= 5; c.T = c.T * 4 + 1) {  // 0, 1, 5
        check_products(kernels, c);
        const HadamardProblem p(c);
        for (const DType dtype : kTypes)
          for (const bool accumulate : {false, true}) check_add(kernels, p, dtype, accumulate);
      }
    }
  return finish();
}
