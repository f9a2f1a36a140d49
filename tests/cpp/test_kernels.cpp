// Compares every kernel of the set that RANDLORA_ISA names with plain loops in double: odd shapes,
// both index widths, every form of B, one thread and three. Exits 77 if the set cannot run.
#include "core/ternary_spec.h"
#include "hadamard.h"

using namespace randlora;

namespace {

// is_plus and is_minus against plain 64-bit arithmetic, at and around every edge of the value rule.
void value_rule() {
  for (const uint32_t t : {1u, 2u, 33554432u, 715827883u, 0x7fffffffu, 0x80000000u})
    for (const uint64_t edge : {uint64_t{0}, uint64_t{t}, 2 * uint64_t{t}, uint64_t{1} << 32})
      for (int64_t step = -2; step <= 2; ++step) {
        const uint32_t u = uint32_t(edge + uint64_t(step));
        EXPECT(is_plus(u, t) == (u < uint64_t{t}), "u %u t %u", u, t);
        EXPECT(is_minus(u, t) == (u >= uint64_t{t} && u < 2 * uint64_t{t}), "u %u t %u", u, t);
      }
}

void generation() {
  ThreadRuntime rt(2);
  for (int64_t col_start : {0, 1, 63, 64, 100})
    for (int64_t cols : {1, 63, 64, 65, 200}) {
      const int64_t rows = 3, words = words_of(cols);
      std::vector<uint64_t> planes(2 * rows * words, ~uint64_t{0});
      const uint32_t limit = threshold(1.0 / 3);
      cpu_kernels().fill_planes({77, kRoleB, limit, 5, rows, col_start, cols, planes.data(),
                                 planes.data() + rows * words},
                                rt);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < words * 64; ++col) {
          const int64_t word = row * words + col / 64;
          const int got = int(planes[word] >> (col & 63) & 1) -
                          int(planes[rows * words + word] >> (col & 63) & 1);
          const int want =
              col < cols ? element(77, kRoleB, uint32_t(5 + row), uint32_t(col_start + col), limit)
                         : 0;
          EXPECT(got == want, "row %ld col %ld of start %ld", long(row), long(col),
                 long(col_start));
        }
    }
}

// Conversions to and from 16 bits: ties, subnormals, overflow, infinities and NaN.
void conversions() {
  Values all = normal(4000, 1);
  for (size_t i = 0; i < all.size(); ++i) all[i] = std::ldexp(all[i], int(i % 50) - 30);
  for (const double v : {0.0, 65504.0, 65519.0, 65520.0, 1e9, 0x1p-24, 0x1p-25, 0x3p-25, 6e-5,
                         double{INFINITY}, double{NAN}, 1 + 0x1p-11, 1 + 0x3p-11, 3.4e38})
    for (const double sign : {1, -1}) all.push_back(static_cast<float>(sign * v));
  const int64_t count = static_cast<int64_t>(all.size());
  const auto same = [](const Array& got, const Values& want) {
    const Values values = got.values();
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT(values[i] == want[i] || (std::isnan(values[i]) && std::isnan(want[i])),
             "%g is converted to %g,", want[i], values[i]);
  };
  const Array wide(DType::f32, all), ones(DType::f32, Values(count, 1.0)), dlam(DType::f32, 1),
      dgam(DType::f32, count);
  CpuKernels kernels(1);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Array low(dtype, all), out(dtype, count);
    kernels.scaled_basis({1, 1, count, ones.get(), ones.get(), wide.get(), out.get(), dtype});
    same(out, low.values());
    kernels.scaled_basis_backward({1, 1, count, ones.get(), ones.get(), ones.get(), low.get(),
                                   dlam.get(), dgam.get(), dtype});
    same(dgam, low.values());
  }
}

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

void hadamard() {
  const HadamardCase cases[] = {
      {1, 1, 1},           {4, 1, 9},     {8, 64, 64},    {7, 61, 96},
      {3, 10, 11},         {60, 50, 50},  // r > d
      {2, 33, 70},         {32, 70, 150}, {32, 260, 330}, {7, 61, 96, 0, 0, 3, true},
      {3, 10, 11, 0, 0, 2}};
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
}

void ternary() {
  struct Shape {
    int64_t in, out, r, T;
  };
  struct Way {
    Form form;
    DType dtype;
    int threads;
  };
  const Way ways[] = {{Form::lists, DType::f32, 1},  {Form::lists, DType::f64, 3},
                      {Form::planes, DType::f32, 3}, {Form::planes, DType::f64, 1},
                      {Form::lists, DType::bf16, 3}, {Form::planes, DType::f16, 1}};
  for (const Shape s : {Shape{1, 1, 1, 1}, Shape{40, 40, 8, 33}, Shape{33, 70, 8, 5},
                        Shape{70, 33, 8, 17}, Shape{20, 30, 32, 3}, Shape{130, 65, 7, 40},
                        Shape{64, 64, 64, 70}, Shape{48, 96, 16, 0}, Shape{96, 600, 32, 150}})
    for (const double density : {0.05, 1.0 / 3, 1.0}) {
      const Layer L(std::max(s.in, s.out), std::min(s.in, s.out), s.r, density);
      const bool expand = L.d == s.in;
      for (const Way& way : ways) {
        const DType dtype = way.dtype;
        CpuKernels kernels(way.threads);
        const TernaryBases basis = L.basis(way.form);
        const double bound = tolerance(dtype);
        check_linear(kernels, L, basis, dtype, s.T, expand, bound);
        check_scaled_basis(kernels, L, dtype, 0);
      }
    }
}

}  // namespace

int main() {
  if (!kernels_can_run()) return 77;
  value_rule();
  generation();
  conversions();
  ternary();
  hadamard();
  return finish();
}
