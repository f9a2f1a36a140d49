// The kernels of Hadamard bases against the equations of core/hadamard.h as loops in double.
#include <cmath>
#include <random>

#include "check.h"
#include "core/stochastic.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"

using namespace randlora;

namespace {

using Values = std::vector<double>;
constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

struct Case {
  int64_t r, d, D;  // of the layer
  int64_t T = 3;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  int64_t first_column = 0, columns = 0, first_row = 0, rows = 0;  // a part; 0: all
};

// How a test starts the kernels: blocks, shared memory, and chunks of scratch memory.
struct Way {
  int threads = 128;
  int64_t shared_bytes = 227 << 10, chunk_bytes = 64 << 20;
  int multiprocessors = 3;
};
struct WayDevice : TestDevice {
  explicit WayDevice(const Way& way) {
    max_threads = way.threads;
    shared_bytes = way.shared_bytes;
    chunk_bytes = way.chunk_bytes;
    multiprocessors = way.multiprocessors;
  }
};

Values normal(int64_t count, unsigned seed, double size = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution(0, size);
  Values v(count);
  for (double& x : v) x = distribution(random);
  return v;
}

// In memory of its own, so that ASan knows its ends.
struct Signs {
  Poisoned memory;
  int64_t count;
  Signs(int64_t count_, unsigned seed) : memory(count_), count(count_) {
    std::mt19937 random(seed);
    for (int64_t e = 0; e < count; ++e) get()[e] = random() % 2 ? 1 : -1;
  }
  int8_t* get() const { return static_cast<int8_t*>(memory.get()); }
  int8_t operator[](int64_t e) const { return get()[e]; }
};

double h(int64_t a, int64_t b) { return hadamard_minus(a, b) ? -1 : 1; }

struct Problem {
  Case c;
  HadamardSizes sizes;
  int64_t D, d, r, n, K, T, classes, first_class;
  Signs s, row, col;
  Values lam, gam;

  static HadamardSizes sizes_of(const Case& c) {
    return {
        c.rows ? c.rows : c.D, c.columns ? c.columns : c.d, c.r, (c.d + c.r - 1) / c.r, c.first_row,
        c.first_column};
  }
  explicit Problem(const Case& c_)
      : c(c_),
        sizes(sizes_of(c)),
        D(sizes.D),
        d(sizes.d),
        r(sizes.r),
        n(sizes.n),
        K(sizes.K()),
        T(c.T),
        classes(sizes.classes()),
        first_class(sizes.first_class()),
        s(d, 1),
        row(D, 2),
        col(K, 3),
        lam(normal(K, 4)),
        gam(normal(n * d, 5)) {}

  double b(int64_t o, int64_t k) const { return row[o] * h(sizes.first_row + o, k) * col[k]; }
  int64_t class_of(int64_t k) const { return (sizes.first_column + k) / n; }

  // (T, K): sum over m of H[j, m] z[m, t, i]
  Values mixed(const Values& z) const {
    Values v(T * K, 0.0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < classes; ++m)
          v[t * K + k] += h(k / n, first_class + m) * z[(m * T + t) * n + k % n];
    return v;
  }
};

// Results may differ by one rounding and, before it, by the rounding of sums of about `largest`.
void expect_close(const char* what, const Problem& p, DType dtype, const Array& got,
                  const Values& want, const Way& way) {
  const double half_ulp = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0;
  double largest = 0;
  for (const double x : want) largest = std::max(largest, std::fabs(x));
  const double before = largest * (dtype == DType::f64 ? 1e-13 : 2e-6);
  const auto values = got.values();
  for (size_t e = 0; e < want.size(); ++e)
    if (!(std::fabs(values[e] - want[e]) <= half_ulp * std::fabs(want[e]) + before)) {
      EXPECT(false,
             "%s[%ld] = %g, not %g: dtype %d r %ld d %ld of %ld D %ld of %ld T %ld skip %ld "
             "threads %d shared %ld",
             what, long(e), values[e], want[e], int(dtype), long(p.r), long(p.d), long(p.c.d),
             long(p.D), long(p.c.D), long(p.T), long(p.c.skip), way.threads,
             long(way.shared_bytes));
      return;
    }
}

void up(const Problem& p, DType dtype, const Way& way, bool accumulate) {
  const double scale = 0.375;
  const int64_t skip = p.c.skip;
  const Array z(dtype, normal(p.classes * p.T * p.n, 6), skip), lam(compute_of(dtype), p.lam, skip);
  const Array y =
      accumulate ? Array(dtype, normal(p.T * p.D, 7), skip) : Array(dtype, p.T * p.D, skip);
  const Values before = y.values(), l = lam.values(), mixed = p.mixed(z.values());
  WayDevice device(way);
  cuda::hadamard_up({p.sizes, z.get(), lam.get(), p.row.get(), p.col.get(), y.get(), dtype, p.T,
                     scale, accumulate},
                    device);
  Values want(p.T * p.D, 0.0);
  for (int64_t t = 0; t < p.T; ++t)
    for (int64_t o = 0; o < p.D; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < p.K; ++k) sum += p.b(o, k) * l[k] * mixed[t * p.K + k];
      want[t * p.D + o] = scale * sum + (accumulate ? before[t * p.D + o] : 0);
    }
  expect_close("up", p, dtype, y, want, way);
}

void down(const Problem& p, DType dtype, const Way& way, int64_t slots) {
  const double scale = 0.75;
  const int64_t skip = p.c.skip, count = p.classes * p.T * p.n;
  const DType compute = compute_of(dtype);
  const Array y(dtype, normal(p.T * p.D, 8), skip), lam(compute, p.lam, skip);
  const Array z(dtype, normal(count, 9), skip), w(dtype, count, skip),
      sums(compute, slots * p.K, skip);
  const Values from = y.values(), l = lam.values(), mixed = p.mixed(z.values());
  WayDevice device(way);
  cuda::hadamard_down(
      {p.sizes, y.get(), lam.get(), p.row.get(), p.col.get(), w.get(), slots ? z.get() : nullptr,
       slots ? sums.get() : nullptr, slots, dtype, p.T, scale},
      device);
  Values u(p.T * p.K, 0.0), want(count, 0.0), want_sums(slots * p.K, 0.0);
  for (int64_t t = 0; t < p.T; ++t)
    for (int64_t k = 0; k < p.K; ++k)  // without the signs of the columns
      for (int64_t o = 0; o < p.D; ++o)
        u[t * p.K + k] += p.row[o] * h(p.sizes.first_row + o, k) * from[t * p.D + o];
  for (int64_t m = 0; m < p.classes; ++m)
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t k = 0; k < p.K; ++k)
        want[(m * p.T + t) * p.n + k % p.n] +=
            scale * h(k / p.n, p.first_class + m) * p.col[k] * l[k] * u[t * p.K + k];
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t t = q * p.T / slots; t < (q + 1) * p.T / slots; ++t)
      for (int64_t k = 0; k < p.K; ++k)
        want_sums[q * p.K + k] += u[t * p.K + k] * mixed[t * p.K + k];
  expect_close("w", p, dtype, w, want, way);
  expect_close("sums", p, compute, sums, want_sums, way);
}

void diagonals(const Problem& p, DType dtype, const Way& way) {
  const int64_t skip = p.c.skip, slots = p.T;
  const DType compute = compute_of(dtype);
  WayDevice device(way);
  const Array gam(compute, p.gam, skip), out(dtype, p.n * p.d, skip);
  cuda::hadamard_gamma({p.sizes, gam.get(), p.s.get(), out.get(), dtype, 0.25}, device);
  Values want = gam.values();
  for (int64_t e = 0; e < p.n * p.d; ++e) want[e] *= 0.25 * p.s[e % p.d];
  expect_close("gamma", p, dtype, out, want, way);

  // Places of columns that the part lacks are NaN.
  Values P = normal(p.classes * p.n * p.n, 10);
  const auto place = [&](int64_t i, int64_t k) {
    const int64_t m = p.class_of(k);
    return ((m - p.first_class) * p.n + i) * p.n + p.sizes.first_column + k - m * p.n;
  };
  std::vector<bool> held(P.size());
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t k = 0; k < p.d; ++k) held[place(i, k)] = true;
  for (size_t e = 0; e < P.size(); ++e)
    if (!held[e]) P[e] = NAN;
  const Array products(dtype, P, skip), sums(compute, normal(slots * p.K, 11), skip),
      dlam(compute, p.K, skip), dgam(compute, p.n * p.d, skip);
  const Values all = products.values(), of_slots = sums.values();
  cuda::hadamard_diagonals({p.sizes, products.get(), sums.get(), slots, p.s.get(), p.col.get(),
                            dlam.get(), dgam.get(), dtype, 0.5, 3},
                           device);
  Values want_lam(p.K, 0.0), want_gam(p.n * p.d);
  for (int64_t q = 0; q < slots; ++q)
    for (int64_t k = 0; k < p.K; ++k) want_lam[k] += 0.5 * p.col[k] * of_slots[q * p.K + k];
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t k = 0; k < p.d; ++k) want_gam[i * p.d + k] = 3.0 * p.s[k] * all[place(i, k)];
  expect_close("dlam", p, compute, dlam, want_lam, way);
  expect_close("dgam", p, compute, dgam, want_gam, way);
}

Values delta(const Problem& p, const Values& lam, const Values& gam, double scale,
             bool transposed) {
  Values dW(p.D * p.d);
  Values column(p.K);
  for (int64_t k = 0; k < p.d; ++k) {
    for (int64_t c = 0; c < p.K; ++c)
      column[c] = scale * lam[c] * h(c / p.n, p.class_of(k)) * p.s[k] * gam[c % p.n * p.d + k];
    for (int64_t o = 0; o < p.D; ++o) {
      double sum = 0;
      for (int64_t c = 0; c < p.K; ++c) sum += p.b(o, c) * column[c];
      dW[transposed ? k * p.D + o : o * p.d + k] = sum;
    }
  }
  return dW;
}

void weight(const Problem& p, DType dtype, const Way& way, bool transposed) {
  const double scale = 0.01;
  const int64_t skip = p.c.skip, size = p.D * p.d;
  const Array lam(compute_of(dtype), p.lam, skip), gam(compute_of(dtype), p.gam, skip),
      base(dtype, normal(size, 12), skip), out(dtype, size, skip), merged(dtype, size, skip);
  HadamardWeight call{p.sizes, lam.get(), gam.get(), p.s.get(), p.row.get(), p.col.get(),
                      nullptr, out.get(), dtype,     scale,     transposed};
  WayDevice device(way);
  cuda::hadamard_weight(call, device);
  call.base = base.get(), call.out = merged.get();
  cuda::hadamard_weight(call, device);
  Values want = delta(p, lam.values(), gam.values(), scale, transposed);
  expect_close("dW", p, dtype, out, want, way);
  const Values start = base.values();
  for (int64_t e = 0; e < size; ++e) want[e] += start[e];
  expect_close("W + dW", p, dtype, merged, want, way);
  std::memcpy(out.get(), base.get(), base.bytes());
  call.base = call.out = out.get();
  cuda::hadamard_weight(call, device);
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
  Values start = normal(size, 13, 4);
  for (double& v : start) v = std::round(v * 256) / 256;
  const Array lam(DType::f32, p.lam), gam(DType::f32, p.gam), base(dtype, start, c.skip),
      out(dtype, size, c.skip);
  HadamardWeight call{p.sizes,     lam.get(),  gam.get(), p.s.get(), p.row.get(),
                      p.col.get(), base.get(), out.get(), dtype,     scale,
                      transposed,  true,       99};
  TestDevice device;
  cuda::hadamard_weight(call, device);
  const Values from = base.values(), dW = delta(p, p.lam, p.gam, scale, transposed);
  for (int64_t e = 0; e < size; ++e) {
    const S want = round_stochastic(float(from[e] + dW[e]), rounding_word(99, uint64_t(e)), S{});
    EXPECT(out.as<S>()[e].bits == want.bits, "stochastic, dtype %d transposed %d skip %ld [%ld]",
           int(dtype), transposed, long(c.skip), long(e));
  }
}

// A NaN in gamma[i, k] reaches column k of dW and no other.
void nonfinite() {
  Problem p({5, 33, 20});
  p.gam[2 * p.d + 17] = NAN;
  for (const DType dtype : kTypes)
    for (const bool transposed : {false, true}) {
      const Array lam(compute_of(dtype), p.lam), gam(compute_of(dtype), p.gam),
          out(dtype, p.D * p.d);
      TestDevice device;
      cuda::hadamard_weight({p.sizes, lam.get(), gam.get(), p.s.get(), p.row.get(), p.col.get(),
                             nullptr, out.get(), dtype, 1, transposed},
                            device);
      const Values got = out.values();
      for (int64_t e = 0; e < p.D * p.d; ++e)
        EXPECT(std::isnan(got[e]) == ((transposed ? e / p.D : e % p.d) == 17), "dtype %d [%ld]",
               int(dtype), long(e));
    }
}

void all(const Case& c, const Way& way) {
  const Problem p(c);
  for (const DType dtype : kTypes) {
    for (const bool accumulate : {false, true}) up(p, dtype, way, accumulate);
    for (const int64_t slots : {0, 1, 2, 5}) down(p, dtype, way, slots);
  }
}
void weights(const Case& c, const Way& way) {
  const Problem p(c);
  for (const DType dtype : kTypes) {
    diagonals(p, dtype, way);
    for (const bool transposed : {false, true}) weight(p, dtype, way, transposed);
  }
}

void tests() {
  const Case cases[] = {{1, 1, 1},
                        {4, 1, 3, 1},
                        {3, 10, 11},
                        {8, 3, 20, 5},  // r > d
                        {7, 61, 61, 9},
                        {7, 61, 100, 2, 1},
                        {12, 48, 64, 33},
                        {20, 64, 700, 2},    // rows that repeat
                        {32, 64, 24, 4, 1},  // D below K
                        {45, 100, 72, 3},    // several blocks of ranks
                        {16, 256, 264, 2, 3},
                        {7, 61, 100, 3, 0, 13, 20, 25, 30},  // parts
                        {7, 61, 100, 3, 1, 9, 9, 88, 12},
                        {32, 64, 64, 3, 0, 62, 2, 16, 32},
                        {45, 100, 640, 2, 0, 51, 30, 200, 440}};
  for (const Case& c : cases)
    for (const Way& way : {Way{}, Way{32, 227 << 10, 64 << 20, 1}}) {
      all(c, way);
      weights(c, way);
    }
  // All passes, in shared memory and in scratch memory, there in chunks of two tokens.
  const Way small{64, 1 << 10, 2 * 4096 * 8};
  for (const Case& c : {Case{2, 4090, 9, 5}, {32, 512, 512, 3, 1}, {45, 100, 72, 3}}) {
    all(c, Way{});
    all(c, small);
  }
  all({1, 8000, 3, 2, 0, 17, 40}, Way{});
  for (const Case& c : {Case{32, 512, 48}, {7, 61, 100, 3, 1, 9, 9, 88, 12}, {4, 90, 150}})
    weights(c, small);
  weights({16, 3000, 5, 0, 0, 170, 40}, Way{});
  for (const int64_t T : {0, 1}) all({5, 33, 20, T}, Way{});
  all({5, 33, 20, 0}, small);
  for (const Case& c : {Case{8, 64, 96}, {8, 64, 96, 1, 1}, {7, 35, 70}})
    for (const bool transposed : {false, true}) {
      stochastic<bf16>(c, DType::bf16, transposed);
      stochastic<f16>(c, DType::f16, transposed);
    }
  nonfinite();
}

}  // namespace

int main() { return run_tests(tests); }
