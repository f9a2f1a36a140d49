// delta_weight_planes and delta_weight_backward_planes against the CPU kernels in double.
#include "check.h"
#include "core/stochastic.h"
#include "cpu/dispatch.h"
#include "cuda/delta/delta_weight.h"
#include "run_tests.h"
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

struct Case {
  int64_t D, d, r;
  double density;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  bool wide = false;
};

std::vector<double> random_values(int64_t count, unsigned seed, double size) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, size);
  std::vector<double> v(count);
  for (double& x : v) x = float(normal(random));
  return v;
}

template <class T>
struct Copy {  // in memory of exactly its size
  Poisoned memory;
  explicit Copy(const T* from, int64_t count) : memory(count * int64_t(sizeof(T))) {
    if (count) std::memcpy(memory.get(), from, count * sizeof(T));
  }
  const T* get() const { return static_cast<const T*>(memory.get()); }
};

struct Problem {
  Case c;
  int64_t n, K;
  ThreadRuntime rt{1};
  Ternary A, B;
  Copy<uint64_t> planes;
  Copy<int64_t> offset;
  Copy<uint16_t> narrow;
  Copy<uint32_t> wide;
  Basis basis;
  std::vector<double> lam, gam;

  explicit Problem(const Case& c_)
      : c(c_),
        n((c.d + c.r - 1) / c.r),
        K(c.r * n),
        A(c.r, c.d, c.density, 1, rt),
        B(c.D, K, c.density, 2, rt),
        planes(B.bits.data(), int64_t(B.bits.size())),
        offset(A.by_row.offset.data(), 2 * c.r + 1),
        narrow(A.by_row.narrow.data(), A.by_row.offset.back()),
        wide(A.by_row.wide.data(), A.by_row.offset.back()),
        // As they are in training: products of lambda and gamma are far below f16's range.
        lam(random_values(K, 3, 1e-4)),
        gam(random_values(n * c.d, 4, 1e-3)) {
    basis.D = c.D, basis.d = c.d, basis.r = c.r, basis.n = n, basis.wide = c.wide;
    basis.a.offset = offset.get();
    basis.a.index = c.wide ? static_cast<const void*>(wide.get()) : narrow.get();
    basis.a.count = A.by_row.offset.back();
    basis.b_planes = {planes.get(), planes.get() + c.D * words_of(K), words_of(K)};
  }
};

void expect_close(const char* what, const Problem& p, DType dtype, bool tf32, bool transposed,
                  const Array& got, const std::vector<double>& want) {
  const double error = relative_error(got.values(), want);
  EXPECT(error <= tolerance(dtype, tf32),
         "%s: %.2e for dtype %d tf32 %d transposed %d D %ld d %ld r %ld density %.2f skip %ld",
         what, error, int(dtype), tf32, transposed, long(p.c.D), long(p.c.d), long(p.c.r),
         p.c.density, long(p.c.skip));
}

void run(Problem& p, DType dtype, bool tf32, bool transposed) {
  const Kernels& cpu = cpu_kernels();
  const int64_t size = p.c.D * p.c.d, skip = p.c.skip;
  const double scale = 0.7e7;
  TestDevice device;
  device.tf32 = tf32;
  const Array lam(compute_of(dtype), p.lam), gam(compute_of(dtype), p.gam);
  const Array base(dtype, random_values(size, 5, 1), skip);
  const auto base_values = base.values();

  std::vector<double> dW(size), sum(size), dlam(p.K), dgam(p.n * p.c.d);
  cpu.delta_weight(
      {p.basis, p.lam.data(), p.gam.data(), nullptr, dW.data(), DType::f64, scale, transposed},
      p.rt);
  for (int64_t e = 0; e < size; ++e) sum[e] = base_values[e] + dW[e];
  const Array out(dtype, size, skip), merged(dtype, size, skip);
  DeltaWeight w{p.basis, lam.get(), gam.get(), nullptr, out.get(), dtype, scale, transposed};
  cuda::delta_weight_planes(w, device);
  expect_close("dW", p, dtype, tf32, transposed, out, dW);
  w.base = base.get(), w.out = merged.get();
  cuda::delta_weight_planes(w, device);
  expect_close("W + dW", p, dtype, tf32, transposed, merged, sum);
  std::memcpy(out.get(), base.get(), base.bytes());
  w.base = w.out = out.get();
  cuda::delta_weight_planes(w, device);
  EXPECT(out.raw() == merged.raw(), "in place, dtype %d", int(dtype));

  // Gradients are computed from what dtype holds, and come in the compute type.
  cpu.delta_weight_backward({p.basis, p.lam.data(), p.gam.data(), base_values.data(), DType::f64,
                             scale, transposed, dlam.data(), dgam.data()},
                            p.rt);
  const Array got_dlam(compute_of(dtype), p.K), got_dgam(compute_of(dtype), p.n * p.c.d);
  cuda::delta_weight_backward_planes({p.basis, lam.get(), gam.get(), base.get(), dtype, scale,
                                      transposed, got_dlam.get(), got_dgam.get()},
                                     device);
  const DType as = tf32 ? dtype : compute_of(dtype);
  expect_close("dlam", p, as, tf32, transposed, got_dlam, dlam);
  expect_close("dgam", p, as, tf32, transposed, got_dgam, dgam);
}

// Where all sums are exact, stochastic rounding is that of core/stochastic.h, bit for bit.
template <class S>
void stochastic(DType dtype, int64_t skip, bool transposed) {
  Problem p({72, 40, 8, 1.0 / 3, skip});
  for (double& v : p.lam) v = v > 0 ? 0.5 : -2;
  for (double& v : p.gam) v = v > 0 ? 1 : 0.25;
  const int64_t size = p.c.D * p.c.d;
  const double scale = 1.0 / 1024;
  const Array lam(DType::f32, p.lam), gam(DType::f32, p.gam),
      base(dtype, random_values(size, 5, 1), skip), out(dtype, size, skip);
  std::vector<double> dW(size);
  cpu_kernels().delta_weight(
      {p.basis, p.lam.data(), p.gam.data(), nullptr, dW.data(), DType::f64, scale, transposed},
      p.rt);
  TestDevice device;
  cuda::delta_weight_planes(
      {p.basis, lam.get(), gam.get(), base.get(), out.get(), dtype, scale, transposed, true, 99},
      device);
  const auto start = base.values();
  for (int64_t e = 0; e < size; ++e) {
    const S want =
        round_stochastic(float(start[e]) + float(dW[e]), rounding_word(99, uint64_t(e)), S{});
    EXPECT(out.as<S>()[e].bits == want.bits, "stochastic, dtype %d transposed %d element %ld",
           int(dtype), transposed, long(e));
  }
}

// A NaN in gamma reaches column k of dW; through FMA, only the rows that B connects it to.
void nonfinite(DType dtype) {
  Problem p({140, 40, 8, 1.0 / 3});
  const int64_t i = 2, k = 7;
  p.gam[i * p.c.d + k] = NAN;
  const Array lam(compute_of(dtype), p.lam), gam(compute_of(dtype), p.gam),
      out(dtype, p.c.D * p.c.d);
  TestDevice device;
  cuda::delta_weight_planes({p.basis, lam.get(), gam.get(), nullptr, out.get(), dtype, 1, false},
                            device);
  const auto got = out.values();
  for (int64_t o = 0; o < p.c.D; ++o)
    for (int64_t col = 0; col < p.c.d; ++col) {
      bool reached = false;
      for (int64_t j = 0; j < p.c.r; ++j)
        reached |= col == k && p.A.dense[j * p.c.d + k] != 0 &&
                   (bytes_of(dtype) == 2 || p.B.dense[o * p.K + j * p.n + i] != 0);
      EXPECT(std::isnan(got[o * p.c.d + col]) == reached, "dtype %d row %ld column %ld", int(dtype),
             long(o), long(col));
    }

  // In the adjoint it reaches dlam[j, i] where A[j, k] is not zero: zeros of A are skipped.
  const Array grad_of_ones(dtype, std::vector<double>(p.c.D * p.c.d, 1)),
      got_dlam(compute_of(dtype), p.K), got_dgam(compute_of(dtype), p.n * p.c.d);
  cuda::delta_weight_backward_planes({p.basis, lam.get(), gam.get(), grad_of_ones.get(), dtype, 1,
                                      false, got_dlam.get(), got_dgam.get()},
                                     device);
  for (int64_t c = 0; c < p.K; ++c)
    EXPECT(
        std::isnan(got_dlam.values()[c]) == (c % p.n == i && p.A.dense[c / p.n * p.c.d + k] != 0),
        "dlam %ld of a NaN in gamma, dtype %d", long(c), int(dtype));
  for (const double v : got_dgam.values()) EXPECT(std::isfinite(v), "dgam of a NaN in gamma");

  // A NaN in G[o, k] reaches dgam[., k], and dlam[j, .] where A[j, k] is not zero.
  const int64_t o = 5;
  auto G = random_values(p.c.D * p.c.d, 6, 1);
  G[o * p.c.d + k] = NAN;
  p.gam[i * p.c.d + k] = 1;
  const Array clean(compute_of(dtype), p.gam), grad(dtype, G), dlam(compute_of(dtype), p.K),
      dgam(compute_of(dtype), p.n * p.c.d);
  cuda::delta_weight_backward_planes(
      {p.basis, lam.get(), clean.get(), grad.get(), dtype, 1, false, dlam.get(), dgam.get()},
      device);
  for (int64_t c = 0; c < p.K; ++c) {
    const bool reached = p.A.dense[c / p.n * p.c.d + k] != 0 &&
                         (bytes_of(dtype) == 2 || p.B.dense[o * p.K + c] != 0);
    EXPECT(std::isnan(dlam.values()[c]) == reached, "dlam %ld, dtype %d", long(c), int(dtype));
  }
  for (int64_t e = 0; e < p.n * p.c.d; ++e)
    if (e % p.c.d != k) EXPECT(std::isfinite(dgam.values()[e]), "dgam %ld", long(e));
}

void tests() {
  const Case cases[] = {{1, 1, 1, 1.0},
                        {40, 40, 8, 1.0 / 3},
                        {70, 33, 7, 0.05, 1},
                        {48, 20, 32, 1.0},
                        {160, 140, 2, 1.0 / 3, 0, true},
                        {264, 136, 6, 1.0 / 3},
                        {130, 65, 16, 0.05, 1, true}};
  for (const Case& c : cases) {
    Problem p(c);
    for (const bool transposed : {false, true}) {
      for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
        run(p, dtype, false, transposed);
      run(p, DType::f32, true, transposed);
    }
  }
  for (const int64_t skip : {0, 1})
    for (const bool transposed : {false, true}) {
      stochastic<bf16>(DType::bf16, skip, transposed);
      stochastic<f16>(DType::f16, skip, transposed);
    }
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) nonfinite(dtype);
}

}  // namespace

int main() { return run_tests(tests); }
