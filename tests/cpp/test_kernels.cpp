// Compares every kernel of the set that RANDLORA_ISA names with plain loops in double: odd shapes,
// both index widths, every form of B, one thread and three. Exits 77 if the set cannot run.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "core/stochastic.h"
#include "core/ternary_spec.h"
#include "cpu/dispatch.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

enum class Form { lists, planes };

// The equations of docs/math.md, unscaled bases, one loop each.
struct Problem {
  int64_t D, d, r, n, K, T;
  bool expand;
  double scale = 0.7;
  ThreadRuntime setup{1};
  Ternary A, B;
  std::vector<double> lam, gam, x, dy, y, dx, dlam, dgam, dW, dA;

  Problem(int64_t in, int64_t out, int64_t rank, int64_t tokens, double density)
      : D(std::max(in, out)),
        d(std::min(in, out)),
        r(rank),
        n((d + r - 1) / r),
        K(r * n),
        T(tokens),
        expand(d == in),
        A(r, d, density, 1, setup),
        B(D, K, density, 2, setup) {
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& v, int64_t count) {
      v.resize(count);
      for (double& e : v) e = float(normal(random));  // exact in float
    };
    fill(lam, K), fill(gam, n * d), fill(x, T * in), fill(dy, T * out);
    dA.assign(K * d, 0);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k)
        dA[c * d + k] = lam[c] * A.dense[c / n * d + k] * gam[c % n * d + k];
    std::vector<double> M(D * d, 0);
    for (int64_t o = 0; o < D; ++o)
      for (int64_t c = 0; c < K; ++c)
        for (int64_t k = 0; k < d; ++k) M[o * d + k] += scale * B.dense[o * K + c] * dA[c * d + k];
    dW.resize(D * d);  // (out, in)
    for (int64_t o = 0; o < D; ++o)
      for (int64_t k = 0; k < d; ++k) dW[expand ? o * d + k : k * D + o] = M[o * d + k];
    y.assign(T * out, 0), dx.assign(T * in, 0);
    std::vector<double> G(D * d, 0);  // gradient of dW (out, in)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t o = 0; o < out; ++o)
        for (int64_t k = 0; k < in; ++k) {
          y[t * out + o] += x[t * in + k] * dW[o * in + k];
          dx[t * in + k] += dy[t * out + o] * dW[o * in + k];
          G[o * in + k] += dy[t * out + o] * x[t * in + k];
        }
    contract(G);
  }

  void contract(const std::vector<double>& G) {
    dlam.assign(K, 0), dgam.assign(n * d, 0);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k) {
        double g = 0;
        for (int64_t o = 0; o < D; ++o)
          g += scale * B.dense[o * K + c] * G[expand ? o * d + k : k * D + o];
        dlam[c] += g * A.dense[c / n * d + k] * gam[c % n * d + k];
        dgam[c % n * d + k] += g * A.dense[c / n * d + k] * lam[c];
      }
  }

  Basis basis(Form form, bool wide) const {
    Basis b;
    b.D = D, b.d = d, b.r = r, b.n = n, b.wide = wide;
    b.a = A.by_row.view(wide);
    if (form == Form::planes) {
      b.b_planes = B.planes;
    } else {
      b.b_rows = B.by_row.view(wide);
      b.b_cols = B.by_column.view(wide);
    }
    return b;
  }
};

template <class C>
std::vector<C> cast(const std::vector<double>& v) {
  return std::vector<C>(v.begin(), v.end());
}

template <class C>
double relative_error(const std::vector<C>& got, const std::vector<double>& want) {
  double error = 0, norm = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

template <class C>
void compare(const char* what, const std::vector<C>& got, const std::vector<double>& want,
             double tolerance, const Problem& p) {
  const double error = relative_error(got, want);
  EXPECT(error < tolerance, "%s: %.2e for D %ld d %ld r %ld T %ld", what, error, long(p.D),
         long(p.d), long(p.r), long(p.T));
}

template <class C>
void run(const Problem& p, Form form, bool wide, int threads) {
  const DType dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;
  const double tolerance = sizeof(C) == 8 ? 1e-13 : 1e-5;
  const Kernels& k = cpu_kernels();
  ThreadRuntime rt(threads);
  const Basis b = p.basis(form, wide);
  const auto lam = cast<C>(p.lam), gam = cast<C>(p.gam), x = cast<C>(p.x), dy = cast<C>(p.dy);
  std::vector<C> y(p.y.size(), C(NAN)), dx(p.dx.size(), C(NAN)), dlam(p.K, C(NAN)),
      dgam(p.n * p.d, C(NAN)), dW(p.D * p.d, C(NAN));

  k.linear({b, lam.data(), gam.data(), x.data(), y.data(), dtype, p.T, p.scale, p.expand, false},
           rt);
  compare("y", y, p.y, tolerance, p);
  k.linear_backward({b, lam.data(), gam.data(), x.data(), dy.data(), dx.data(), dtype, p.T, p.scale,
                     p.expand, false, dlam.data(), dgam.data()},
                    rt);
  compare("dx", dx, p.dx, tolerance, p);
  compare("dlam", dlam, p.dlam, 3 * tolerance, p);
  compare("dgam", dgam, p.dgam, 3 * tolerance, p);

  k.delta_weight({b, lam.data(), gam.data(), nullptr, dW.data(), dtype, p.scale, !p.expand}, rt);
  compare("dW", dW, p.dW, tolerance, p);
  const auto base = dW;
  k.delta_weight({b, lam.data(), gam.data(), base.data(), dW.data(), dtype, p.scale, !p.expand},
                 rt);
  auto twice = p.dW;
  for (double& v : twice) v *= 2;
  compare("W + dW", dW, twice, tolerance, p);

  Problem contracted = p;
  contracted.contract(p.dW);
  k.delta_weight_backward(
      {b, lam.data(), gam.data(), base.data(), dtype, p.scale, !p.expand, dlam.data(), dgam.data()},
      rt);
  compare("delta dlam", dlam, contracted.dlam, 3 * tolerance, p);
  compare("delta dgam", dgam, contracted.dgam, 3 * tolerance, p);

  std::vector<C> scaled(p.K * p.d, C(NAN));
  const auto A = cast<C>(p.A.dense);
  k.scaled_basis({p.r, p.n, p.d, A.data(), lam.data(), gam.data(), scaled.data(), dtype}, rt);
  compare("A'", scaled, p.dA, tolerance, p);
}

double value_of(float x) { return x; }
double value_of(double x) { return x; }

// Stochastically rounded dW must equal round_stochastic of the same kernel's floats. Uses no base,
// because compilers decide loop by loop whether to fuse its addition with the scale.
template <class S>
void stochastic(const Problem& p, DType dtype) {
  ThreadRuntime rt(3);
  const auto lam = cast<float>(p.lam), gam = cast<float>(p.gam);
  std::vector<float> sum(p.dW.size(), NAN);
  std::vector<S> got(p.dW.size());
  DeltaWeight call{p.basis(Form::lists, false),
                   lam.data(),
                   gam.data(),
                   nullptr,
                   sum.data(),
                   DType::f32,
                   p.scale,
                   !p.expand};
  cpu_kernels().delta_weight(call, rt);
  call.out = got.data(), call.dtype = dtype;
  call.stochastic = true, call.rounding_seed = 0x123456789abcu;
  cpu_kernels().delta_weight(call, rt);
  for (size_t e = 0; e < got.size(); ++e)
    EXPECT(got[e].bits == round_stochastic(sum[e], rounding_word(call.rounding_seed, e), S{}).bits,
           "element %zu of D %ld d %ld", e, long(p.D), long(p.d));
}

// base + delta, to nearest and stochastically, in every magnitude of S.
template <class S>
void add_rounded(DType dtype, int64_t count) {
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> exponent(-26, 17);
  std::vector<float> delta(count);
  std::vector<S> base(count), got(count);
  for (float& x : delta) x = float(std::ldexp(normal(random), exponent(random)));
  for (S& x : base)
    x = round_stochastic(float(std::ldexp(normal(random), std::min(12, exponent(random)))), 0, S{});
  for (const S* from : {static_cast<const S*>(nullptr), static_cast<const S*>(base.data())})
    for (const bool stochastic : {false, true})
      for (const int threads : {1, 3}) {
        ThreadRuntime rt(threads);
        cpu_kernels().add_rounded(
            {count, from, delta.data(), got.data(), dtype, stochastic, 0x123456789abcu}, rt);
        for (int64_t e = 0; e < count; ++e) {
          const float x = from ? float(value_of(base[e])) + delta[e] : delta[e];
          const S low = round_stochastic(x, 0, S{}), high = round_stochastic(x, ~0u, S{});
          const double to_low = std::fabs(x - value_of(low)),
                       to_high = std::fabs(x - value_of(high));
          const S near = to_low < to_high || (to_low == to_high && low.bits % 2 == 0) ? low : high;
          const S want = stochastic
                             ? round_stochastic(x, rounding_word(0x123456789abcu, uint64_t(e)), S{})
                             : near;
          EXPECT(got[e].bits == want.bits, "element %ld of %ld, dtype %d stochastic %d base %d",
                 long(e), long(count), int(dtype), stochastic, from != nullptr);
        }
      }
}

// Two records of tests/data/basis_v1.txt, for machines without Python (run_aarch64.sh). All are in
// tests/basis/test_basis_spec.py.
void known_answers() {
  const uint32_t pi[6] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0};
  const Counter4 got = philox4x32_10(Counter4{{pi[0], pi[1], pi[2], pi[3]}}, pi[4], pi[5]);
  EXPECT(got.v[0] == 0xd16cfe09 && got.v[1] == 0x94fdcceb && got.v[2] == 0x5001e420 &&
             got.v[3] == 0x24126ea1,
         "Random123's answer on the digits of pi");
  const std::string want =
      "+++0++000000-00+0+0++000+0000000++00+0000+0----0+-+00-00+00-0000000-0-00+0-++000"
      "+000+00-00-000000+-0000+0-+000000-00-0000-000+000000000+00+000000+0000-00000-000"
      "+0+00--0000-+00-00-0-0-000000000-00-0000";
  std::string signs;
  for (uint32_t c = 0; c < want.size(); ++c)
    signs += "-0+"[element(0x0123456789abcdef, kRoleB, 1000, 37 + c, threshold(1.0 / 3)) + 1];
  EXPECT(signs == want, "%s", signs.c_str());
}

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

}  // namespace

int main() {
  try {
    std::printf("kernels: %s\n", cpu_kernels().isa);
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return 77;
  }
  known_answers();
  value_rule();
  generation();
  for (int64_t count : {1, 7, 4096, 9001}) {
    add_rounded<bf16>(DType::bf16, count);
    add_rounded<f16>(DType::f16, count);
  }
  struct Shape {
    int64_t in, out, r, T;
  };
  for (const Shape s : {Shape{1, 1, 1, 1}, Shape{40, 40, 8, 33}, Shape{33, 70, 8, 5},
                        Shape{70, 33, 8, 17}, Shape{20, 30, 32, 3}, Shape{130, 65, 7, 40},
                        Shape{64, 64, 64, 70}, Shape{48, 96, 16, 0}, Shape{96, 600, 32, 150}}) {
    for (double density : {0.05, 1.0 / 3, 1.0}) {
      const Problem p(s.in, s.out, s.r, s.T, density);
      stochastic<bf16>(p, DType::bf16);
      stochastic<f16>(p, DType::f16);
      for (Form form : {Form::lists, Form::planes})
        for (bool wide : {false, true})
          for (int threads : {1, 3}) {
            run<double>(p, form, wide, threads);
            run<float>(p, form, wide, threads);
          }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
