// Compares the kernels of Hadamard bases (core/hadamard.h) of the set that RANDLORA_ISA names with
// plain loops in double: odd shapes, parts of layers, every dtype, one thread and three. Exits 77
// if the set cannot run.
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "check.h"
#include "core/stochastic.h"
#include "cpu/dispatch.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

template <class S>
S rounded(double v) {
  if constexpr (sizeof(S) >= 4) {
    return S(v);
  } else {
    // Numbers with few bits are exact in both 16-bit types; the caller gives no others.
    uint32_t bits;
    const float f = float(v);
    memcpy(&bits, &f, 4);
    if (std::is_same_v<S, bf16>) return S{uint16_t(bits >> 16)};
    if (v == 0) return S{0};
    return S{uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) |
                      (bits >> 13 & 0x3ff))};
  }
}
template <class S>
double value(S v) {
  if constexpr (sizeof(S) >= 4) {
    return double(v);
  } else if constexpr (std::is_same_v<S, bf16>) {
    return double(float_of_bits(uint32_t(v.bits) << 16));
  } else {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    const double m =
        exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return v.bits >> 15 ? -m : m;
  }
}

// Numbers of a few bits, so that 16-bit types hold them exactly.
std::vector<double> numbers(int64_t count, std::mt19937& random) {
  std::vector<double> v(count);
  for (double& e : v) e = (int(random() % 15) - 7) / 8.0;
  return v;
}
std::vector<int8_t> signs(int64_t count, std::mt19937& random) {
  std::vector<int8_t> v(count);
  for (int8_t& e : v) e = random() % 2 ? 1 : -1;
  return v;
}
// As S, with a vector of NaN behind: what kernels may read there must not reach a result.
template <class S>
std::vector<S> as(const std::vector<double>& from) {
  std::vector<S> v;
  for (double e : from) v.push_back(rounded<S>(e));
  for (int l = 0; l < 64; ++l) v.push_back(sizeof(S) == 2 ? rounded<S>(1.0) : S{});
  if constexpr (sizeof(S) >= 4)
    for (int l = 0; l < 64; ++l) v[from.size() + l] = std::numeric_limits<S>::quiet_NaN();
  return v;
}
double sign(int64_t a, int64_t b) { return __builtin_popcountll(a & b) % 2 ? -1 : 1; }

template <class S>
void check_near(const std::vector<S>& got, const std::vector<double>& want, const char* what,
                const HadamardSizes& s, int64_t T) {
  double error = 0, norm = 0;
  for (size_t e = 0; e < want.size(); ++e) {
    error += std::pow(value(got[e]) - want[e], 2), norm += want[e] * want[e];
  }
  const double bound = sizeof(S) == 8            ? 1e-14
                       : sizeof(S) == 4          ? 1e-6
                       : std::is_same_v<S, bf16> ? 4e-3
                                                 : 1e-3;
  EXPECT(std::sqrt(error) <= bound * std::sqrt(norm),
         "%s: r %ld n %ld d %ld D %ld T %ld row %ld column %ld: %g of %g", what, long(s.r),
         long(s.n), long(s.d), long(s.D), long(T), long(s.first_row), long(s.first_column),
         std::sqrt(error), std::sqrt(norm));
}

template <class S>
void all(const HadamardSizes& s, DType dtype, int64_t T, int threads) {
  using C = typename ComputeOf<S>::type;
  std::mt19937 random(unsigned(s.d * 7 + T));
  ThreadRuntime rt(threads);
  const Kernels& kernels = cpu_kernels();
  const int64_t K = s.K(), n = s.n, classes = s.classes(), first = s.first_class();
  const auto lam = numbers(K, random), gam = numbers(n * s.d, random),
             z = numbers(classes * T * n, random), y = numbers(T * s.D, random),
             base = numbers(s.D * s.d, random), P = numbers(classes * n * n, random);
  const auto sd = signs(s.d, random), row = signs(s.D, random), col = signs(K, random);
  const auto lam_c = as<C>(lam), gam_c = as<C>(gam);
  const auto z_s = as<S>(z), y_s = as<S>(y), P_s = as<S>(P);
  const double scale = 0.5;

  // mixed[t, c] = sum over m of H[j, m] z[m, t, i]
  std::vector<double> mixed(T * K), u(T * K), want;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < K; ++c)
      for (int64_t m = 0; m < classes; ++m)
        mixed[t * K + c] += sign(c / n, first + m) * z[(m * T + t) * n + c % n];
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < K; ++c)
      for (int64_t o = 0; o < s.D; ++o)
        u[t * K + c] += row[o] * sign(s.first_row + o, c) * y[t * s.D + o];

  for (const bool accumulate : {false, true}) {
    std::vector<S> out = y_s;
    kernels.hadamard_up({s, z_s.data(), lam_c.data(), row.data(), col.data(), out.data(), dtype, T,
                         scale, accumulate},
                        rt);
    want.assign(T * s.D, 0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t o = 0; o < s.D; ++o) {
        for (int64_t c = 0; c < K; ++c)
          want[t * s.D + o] +=
              scale * row[o] * sign(s.first_row + o, c) * col[c] * lam[c] * mixed[t * K + c];
        if (accumulate) want[t * s.D + o] += y[t * s.D + o];
      }
    check_near(out, want, "up", s, T);
  }

  for (const bool with_z : {false, true}) {
    const int64_t slots = T == 0 ? 0 : (T + 2) / 3;
    std::vector<S> w = as<S>(std::vector<double>(classes * T * n));
    std::vector<C> sums(slots * K + 1, C(7));
    kernels.hadamard_down(
        {s, y_s.data(), lam_c.data(), row.data(), col.data(), w.data(),
         with_z ? z_s.data() : nullptr, with_z ? sums.data() : nullptr, slots, dtype, T, scale},
        rt);
    want.assign(classes * T * n, 0);
    for (int64_t m = 0; m < classes; ++m)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < K; ++c)
          want[(m * T + t) * n + c % n] +=
              scale * sign(c / n, first + m) * col[c] * lam[c] * u[t * K + c];
    check_near(w, want, "down", s, T);
    if (!with_z) continue;
    std::vector<double> dots(slots * K);
    for (int64_t q = 0; q < slots; ++q)
      for (int64_t t = q * T / slots; t < (q + 1) * T / slots; ++t)
        for (int64_t c = 0; c < K; ++c) dots[q * K + c] += u[t * K + c] * mixed[t * K + c];
    std::vector<C> got(sums.begin(), sums.begin() + slots * K);
    check_near(got, dots, "sums", s, T);
    EXPECT(sums.back() == C(7), "sums: written behind the end");
    std::vector<C> dlam(K), dgam(n * s.d);
    kernels.hadamard_diagonals({s, P_s.data(), sums.data(), slots, sd.data(), col.data(),
                                dlam.data(), dgam.data(), dtype, 0.25, 2.0},
                               rt);
    want.assign(K, 0);
    for (int64_t q = 0; q < slots; ++q)
      for (int64_t c = 0; c < K; ++c) want[c] += 0.25 * col[c] * dots[q * K + c];
    check_near(dlam, want, "dlam", s, T);
    want.assign(n * s.d, 0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < s.d; ++k) {
        const int64_t at = s.first_column + k, m = at / n;
        want[i * s.d + k] = 2.0 * sd[k] * P[((m - first) * n + i) * n + at % n];
      }
    check_near(dgam, want, "dgam", s, T);
  }

  std::vector<S> signed_gam = as<S>(std::vector<double>(n * s.d));
  kernels.hadamard_gamma({s, gam_c.data(), sd.data(), signed_gam.data(), dtype, 2.0}, rt);
  want.resize(n * s.d);
  for (int64_t e = 0; e < n * s.d; ++e) want[e] = 2.0 * sd[e % s.d] * gam[e];
  check_near(signed_gam, want, "gamma", s, T);

  for (const bool accumulate : {false, true}) {
    const auto x = numbers(T * s.d, random);
    std::vector<S> out = as<S>(x);
    kernels.hadamard_add({s, z_s.data(), out.data(), dtype, T, scale, accumulate}, rt);
    want.resize(T * s.d);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < s.d; ++k) {
        const int64_t at = s.first_column + k, m = at / n - first;
        want[t * s.d + k] = scale * z[(m * T + t) * n + at % n] + (accumulate ? x[t * s.d + k] : 0);
      }
    check_near(out, want, "add", s, T);
  }

  if (T != 1) return;  // what follows has no tokens
  for (const bool transposed : {false, true})
    for (const bool adds : {false, true}) {
      const auto base_s = as<S>(base);
      std::vector<S> out = as<S>(std::vector<double>(s.D * s.d));
      HadamardWeight p{s,
                       lam_c.data(),
                       gam_c.data(),
                       sd.data(),
                       row.data(),
                       col.data(),
                       adds ? base_s.data() : nullptr,
                       out.data(),
                       dtype,
                       scale,
                       transposed};
      kernels.hadamard_weight(p, rt);
      want.assign(s.D * s.d, 0);
      for (int64_t o = 0; o < s.D; ++o)
        for (int64_t k = 0; k < s.d; ++k) {
          const int64_t m = (s.first_column + k) / n, e = transposed ? k * s.D + o : o * s.d + k;
          for (int64_t c = 0; c < K; ++c)
            want[e] += scale * row[o] * sign(s.first_row + o, c) * col[c] * lam[c] *
                       sign(c / n, m) * sd[k] * gam[c % n * s.d + k];
          if (adds) want[e] += base[e];
        }
      check_near(out, want, "weight", s, T);
      if constexpr (sizeof(S) == 2) {  // neighbours of the exact sum, decided by the seed
        p.stochastic = true, p.rounding_seed = 5;
        std::vector<S> one(out.size()), two(out.size());
        p.out = one.data(), kernels.hadamard_weight(p, rt);
        p.out = two.data(), kernels.hadamard_weight(p, rt);
        const double ulp = std::is_same_v<S, bf16> ? 0x1p-7 : 0x1p-10;
        for (int64_t e = 0; e < s.D * s.d; ++e) {
          EXPECT(one[e].bits == two[e].bits, "stochastic rounding repeats");
          EXPECT(std::fabs(value(one[e]) - want[e]) <= ulp * std::fabs(want[e]) + 1e-5,
                 "stochastic %ld", long(e));
        }
      }
    }
}

}  // namespace

int main() {
  try {
    std::printf("kernels: %s\n", cpu_kernels().isa);
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return 77;
  }
  const auto sizes = [](int64_t D, int64_t d, int64_t r, int64_t row = 0, int64_t column = 0,
                        int64_t of_layer = 0) {
    return HadamardSizes{D, d, r, ((of_layer ? of_layer : d) + r - 1) / r, row, column};
  };
  for (const HadamardSizes& s :
       {sizes(1, 1, 1), sizes(9, 1, 4), sizes(64, 64, 8), sizes(96, 61, 7), sizes(11, 10, 3),
        sizes(50, 50, 60), sizes(70, 33, 2), sizes(150, 70, 32), sizes(45, 130, 16, 5, 0, 130),
        sizes(40, 23, 7, 13, 20, 61), sizes(20, 9, 4, 3, 16, 64), sizes(33, 3, 5, 90, 11, 40),
        sizes(330, 260, 32)})
    for (const int64_t T : {0, 1, 5}) {
      all<float>(s, DType::f32, T, 1);
      all<float>(s, DType::f32, T, 3);
      all<double>(s, DType::f64, T, 3);
      all<bf16>(s, DType::bf16, T, 3);
      all<f16>(s, DType::f16, T, 3);
    }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
