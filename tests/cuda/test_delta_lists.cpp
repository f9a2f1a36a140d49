// dW from lists and its adjoint (csrc/cuda/delta/delta_lists.cu, delta_lists_backward.cu) against
// the CPU kernels in double: odd shapes, all dtypes, both orientations and index widths, with and without a
// base, small and large shared memory, aligned and not; stochastic rounding bit for bit.
#include "check.h"
#include "core/stochastic.h"
#include "cpu/dispatch.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

struct Shape {
  int64_t D, d, r;
};

// How a case is run: what must not change the result.
struct Setting {
  bool transposed, wide;
  int64_t shared_bytes;
  int threads;
  int64_t skip;  // elements that out, base and grad are off alignment
};

// Lists in memory of their exact size.
struct DeviceLists {
  Poisoned offset, index;
  int64_t count;
  DeviceLists(const Ternary::OwnedLists& l, bool wide)
      : offset(static_cast<int64_t>(l.offset.size()) * 8),
        index(l.offset.back() * (wide ? 4 : 2)),
        count(l.offset.back()) {
    std::memcpy(offset.get(), l.offset.data(), l.offset.size() * 8);
    if (count > 0)
      std::memcpy(index.get(), l.view(wide).index, static_cast<size_t>(count) * (wide ? 4 : 2));
  }
  AnyLists view() const { return {static_cast<const int64_t*>(offset.get()), index.get(), count}; }
};

std::vector<double> normal(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  std::vector<double> v(count);
  for (double& e : v) e = distribution(random);
  return v;
}

struct Problem {
  Shape s;
  int64_t n, K;
  double scale = 0.7;
  ThreadRuntime setup{1};
  Ternary A, B;

  Problem(Shape shape, double density_A, double density_B)
      : s(shape),
        n((s.d + s.r - 1) / s.r),
        K(n * s.r),
        A(s.r, s.d, density_A, 1, setup),
        B(s.D, K, density_B, 2, setup) {}

  Basis cpu_basis() const {
    Basis b;
    b.D = s.D, b.d = s.d, b.r = s.r, b.n = n;
    b.a = A.by_row.view(false), b.b_rows = B.by_row.view(false), b.b_cols = B.by_column.view(false);
    return b;
  }
};

void check(const char* what, const Problem& p, const Setting& set, DType dtype,
           const std::vector<double>& got, const std::vector<double>& want, double bound) {
  const double error = relative_error(got, want);
  EXPECT(error <= bound,
         "%s: %.2e for D %ld d %ld r %ld, dtype %d, transposed %d wide %d shared %ld threads %d "
         "skip %ld",
         what, error, long(p.s.D), long(p.s.d), long(p.s.r), int(dtype), set.transposed, set.wide,
         long(set.shared_bytes), set.threads, long(set.skip));
}

// What the device kernels run on.
struct Call {
  TestDevice device;
  DeviceLists a, rows, cols;
  Basis basis;
  Array lam, gam;

  Call(const Problem& p, const Setting& set, DType dtype)
      : a(p.A.by_row, set.wide),
        rows(p.B.by_row, set.wide),
        cols(p.B.by_column, set.wide),
        lam(compute_of(dtype), normal(p.K, 3)),
        gam(compute_of(dtype), normal(p.n * p.s.d, 4)) {
    device.shared_bytes = set.shared_bytes;
    device.max_threads = set.threads;
    basis.D = p.s.D, basis.d = p.s.d, basis.r = p.s.r, basis.n = p.n, basis.wide = set.wide;
    basis.a = a.view(), basis.b_rows = rows.view(), basis.b_cols = cols.view();
  }
};

void forward(const Problem& p, const Setting& set, DType dtype, bool with_base) {
  Call call(p, set, dtype);
  const int64_t size = p.s.D * p.s.d;
  const Array base(dtype, normal(size, 5), set.skip), out(dtype, size, set.skip);
  DeltaWeight op{call.basis, call.lam.get(), call.gam.get(), with_base ? base.get() : nullptr,
                 out.get(),  dtype,          p.scale,        set.transposed};
  cuda::delta_weight(op, call.device);

  const auto lam = call.lam.values(), gam = call.gam.values(), wide_base = base.values();
  std::vector<double> want(size);
  ThreadRuntime rt(1);
  cpu_kernels().delta_weight(
      {p.cpu_basis(), lam.data(), gam.data(), with_base ? wide_base.data() : nullptr, want.data(),
       DType::f64, p.scale, set.transposed},
      rt);
  check(with_base ? "W + dW" : "dW", p, set, dtype, out.values(), want, tolerance(dtype));
}

void backward(const Problem& p, const Setting& set, DType dtype) {
  Call call(p, set, dtype);
  const Array grad(dtype, normal(p.s.D * p.s.d, 6), set.skip);
  const Array dlam(compute_of(dtype), p.K), dgam(compute_of(dtype), p.n * p.s.d);
  cuda::delta_weight_backward({call.basis, call.lam.get(), call.gam.get(), grad.get(), dtype,
                               p.scale, set.transposed, dlam.get(), dgam.get()},
                              call.device);

  const auto lam = call.lam.values(), gam = call.gam.values(), G = grad.values();
  std::vector<double> want_dlam(p.K), want_dgam(p.n * p.s.d);
  ThreadRuntime rt(1);
  cpu_kernels().delta_weight_backward({p.cpu_basis(), lam.data(), gam.data(), G.data(), DType::f64,
                                       p.scale, set.transposed, want_dlam.data(), want_dgam.data()},
                                      rt);
  // 16-bit gradients are widened exactly: no more error than in float.
  const double bound = tolerance(compute_of(dtype));
  check("dlam", p, set, dtype, dlam.values(), want_dlam, bound);
  check("dgam", p, set, dtype, dgam.values(), want_dgam, bound);
}

// The same sums in float, rounded by hand.
template <class S>
void stochastic(const Problem& p, const Setting& set, DType dtype) {
  Call call(p, set, dtype);
  const int64_t size = p.s.D * p.s.d;
  const Array out(dtype, size, set.skip), sum(DType::f32, size, set.skip);
  DeltaWeight op{call.basis, call.lam.get(), call.gam.get(), nullptr,
                 sum.get(),  DType::f32,     p.scale,        set.transposed};
  op.stochastic = true, op.rounding_seed = 0xfedcba9876543210u;  // of no effect in float
  cuda::delta_weight(op, call.device);
  op.out = out.get(), op.dtype = dtype;
  cuda::delta_weight(op, call.device);
  int64_t wrong = 0;
  for (int64_t e = 0; e < size; ++e)
    wrong += out.as<S>()[e].bits !=
             round_stochastic(sum.as<float>()[e], rounding_word(op.rounding_seed, uint64_t(e)), S{})
                 .bits;
  EXPECT(wrong == 0, "%ld elements rounded otherwise, D %ld d %ld dtype %d", long(wrong),
         long(p.s.D), long(p.s.d), int(dtype));
  // With a base within one step of the 16-bit type: twice the error of rounding to nearest.
  const Array base(dtype, normal(size, 5), set.skip);
  op.base = base.get();
  cuda::delta_weight(op, call.device);
  auto want = sum.values();
  const auto w = base.values();
  for (int64_t e = 0; e < size; ++e) want[e] += w[e];
  check("W + dW, stochastic", p, set, dtype, out.values(), want, tolerance(dtype));
}

// A base may be the output itself; and an infinity of gamma reaches only what it is connected to.
void in_place_and_infinite(const Problem& p) {
  const Setting set{false, false, 227 << 10, 128, 0};
  Call call(p, set, DType::f32);
  const int64_t size = p.s.D * p.s.d;
  const Array twice(DType::f32, size), once(DType::f32, size);
  DeltaWeight op{call.basis, call.lam.get(), call.gam.get(), nullptr,
                 once.get(), DType::f32,     p.scale,        false};
  cuda::delta_weight(op, call.device);
  op.out = twice.get();
  cuda::delta_weight(op, call.device);
  op.base = twice.get();
  cuda::delta_weight(op, call.device);
  auto want = once.values();
  for (double& v : want) v *= 2;
  check("dW + dW in place", p, set, DType::f32, twice.values(), want, 1e-6);

  const int64_t i = p.n / 2, k = p.s.d / 2;
  call.gam.as<float>()[i * p.s.d + k] = INFINITY;
  cuda::delta_weight(op, call.device);
  const auto got = twice.values();
  for (int64_t o = 0; o < p.s.D; ++o)
    for (int64_t m = 0; m < p.s.d; ++m) {
      bool reached = false;
      for (int64_t j = 0; j < p.s.r; ++j)
        reached |= m == k && p.A.dense[j * p.s.d + k] != 0 && p.B.dense[o * p.K + j * p.n + i] != 0;
      EXPECT(std::isfinite(got[o * p.s.d + m]) == !reached, "row %ld column %ld", long(o), long(m));
    }
}

void schedules(const Problem& p) {
  for (bool transposed : {false, true}) {
    const Setting set{transposed, false, 8 << 10, 128, 0};
    EXPECT(cuda_on_cpu::same_bits_under_all_schedules([&] {
             Call call(p, set, DType::bf16);
             const int64_t size = p.s.D * p.s.d;
             const Array out(DType::bf16, size), dlam(DType::f32, p.K),
                 dgam(DType::f32, p.n * p.s.d);
             cuda::delta_weight({call.basis, call.lam.get(), call.gam.get(), nullptr, out.get(),
                                 DType::bf16, p.scale, transposed},
                                call.device);
             cuda::delta_weight_backward({call.basis, call.lam.get(), call.gam.get(), out.get(),
                                          DType::bf16, p.scale, transposed, dlam.get(), dgam.get()},
                                         call.device);
             auto bits = out.raw();
             for (const Array* a : {&dlam, &dgam}) {
               const auto more = a->raw();
               bits.insert(bits.end(), more.begin(), more.end());
             }
             return bits;
           }),
           "results depend on the order of threads");
  }
}

void tests() {
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  // r > d; d not divisible by r; n = 1; supports of over 96 and rows of over 32 entries; empty
  // ones.
  const struct {
    Shape s;
    double density_A, density_B;
  } cases[] = {{{1, 1, 1}, 1, 1},       {{33, 20, 32}, 1.0 / 3, 1.0 / 3}, {{40, 40, 8}, 0.05, 0.05},
               {{70, 33, 8}, 0.3, 0.1}, {{48, 16, 16}, 0.2, 0.3},         {{64, 64, 64}, 0.1, 0.05},

               {{260, 130, 4}, 1, 0.3}, {{300, 136, 33}, 0.05, 0.05},     {{65, 65, 7}, 0, 0.1},
               {{65, 65, 7}, 0.1, 0},   {{600, 96, 32}, 1.0 / 3, 0.05}};
  int number = 0;
  for (const auto& c : cases) {
    const Problem p(c.s, c.density_A, c.density_B);
    for (DType dtype : dtypes)
      for (bool transposed : {false, true}) {
        // The rest takes turns, each at a period of its own that has nothing in common with those of
        // dtype and orientation.
        ++number;
        const auto every = [&](int period, int turn = 0) { return number % period == turn; };
        const Setting set{transposed, number % 7 < 3, every(3) ? 6 << 10 : 227 << 10,
                          every(5)    ? 64
                          : every(11) ? 32
                                      : 128,
                          number % 9 < 4};
        forward(p, set, dtype, !every(3, 1));
        backward(p, set, dtype);
        if (dtype == DType::bf16) stochastic<bf16>(p, set, dtype);
        if (dtype == DType::f16) stochastic<f16>(p, set, dtype);
      }
  }
  in_place_and_infinite(Problem({70, 33, 8}, 0.3, 0.1));
  schedules(Problem({80, 72, 8}, 0.3, 0.2));
}

}  // namespace

int main() { return run_tests(tests); }
