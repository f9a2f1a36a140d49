// Arrays of any dtype whose ends the sanitizers know, random numbers, and comparison by norm.
#pragma once
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "check.h"
#include "core/dtype.h"

namespace randlora {

using Values = std::vector<double>;
// Marks the tests' own arithmetic, which the sanitizers skip: it took half of their time.
#define RANDLORA_UNWATCHED __attribute__((no_sanitize("address", "undefined", "thread")))
// ThreadSanitizer looks for races: float64's kernels synchronise as float32's, float16's as
// bfloat16's.
#if defined(__SANITIZE_THREAD__)
constexpr DType kTypes[] = {DType::f32, DType::bf16};
#else
constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
#endif

inline double double_of(float x) { return x; }
inline double double_of(double x) { return x; }
inline double double_of(bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
inline double double_of(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return static_cast<double>(h);
}

// To nearest, ties to even.
inline void store_rounded(double v, float* to) { *to = static_cast<float>(v); }
inline void store_rounded(double v, double* to) { *to = v; }
inline void store_rounded(double v, bf16* to) {
  const float f = static_cast<float>(v);
  const uint32_t bits = bits_of_float(f);
  to->bits =
      static_cast<uint16_t>(std::isnan(f) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void store_rounded(double v, f16* to) {
  const _Float16 h = static_cast<_Float16>(static_cast<float>(v));
  std::memcpy(&to->bits, &h, 2);
}

// Changes with every bit that a test reads out of an Array (tests/cuda/test_device.h).
constexpr uint64_t kDigestStart = 0xcbf29ce484222325u;
inline uint64_t digest = kDigestStart;
RANDLORA_UNWATCHED inline void add_to_digest(const void* data, int64_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  uint64_t sum = digest;
  for (int64_t i = 0; i < bytes; ++i) sum = (sum ^ p[i]) * 0x100000001b3u;  // FNV-1a
  digest = sum;
}

// An array of `dtype`: poisoned, or holding `values` rounded to dtype. `skip` elements lie before
// it, to take its 16-byte alignment away, and `behind` elements of NaN after it.
class Array {
 public:
  Array(DType dtype, int64_t count, int64_t skip = 0, int64_t behind = 0)
      : dtype_(dtype),
        count_(count),
        memory_(new Poisoned((count + behind) * bytes_of(dtype), skip * bytes_of(dtype))) {}
  Array(DType dtype, const Values& values, int64_t skip = 0, int64_t behind = 0)
      : Array(dtype, static_cast<int64_t>(values.size()), skip, behind) {
    with_dtype(dtype, [&](auto s) {
      auto* p = static_cast<decltype(s)*>(get());
      for (int64_t i = 0; i < count_; ++i) store_rounded(values[i], p + i);
    });
  }
  void* get() const { return memory_->get(); }
  template <class T>
  T* as() const {
    return static_cast<T*>(get());
  }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * bytes_of(dtype_); }
  Values values() const {
    add_to_digest(get(), bytes());
    Values v(count_);
    with_dtype(dtype_, [&](auto s) {
      const auto* p = static_cast<decltype(s)*>(get());
      for (int64_t i = 0; i < count_; ++i) v[i] = double_of(p[i]);
    });
    return v;
  }
  std::vector<unsigned char> raw() const {
    add_to_digest(get(), bytes());
    const auto* p = static_cast<const unsigned char*>(get());
    return {p, p + bytes()};
  }

 private:
  DType dtype_;
  int64_t count_;
  std::unique_ptr<Poisoned> memory_;
};

// Exact in float. Drawn once: the same numbers meet every kernel.
inline const Values& normal(int64_t count, unsigned seed, double size = 1) {
  static std::map<std::tuple<int64_t, unsigned, double>, Values> drawn;
  Values& v = drawn[{count, seed, size}];
  if (!v.empty()) return v;
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution(0, size);
  v.resize(count);
  for (double& x : v) x = static_cast<float>(distribution(random));
  return v;
}

inline Values sum(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// out (M, N) = scale * left (M, K) right (K, N). Where `lines`, right is (N, K); where `by_column`,
// left is (K, M).
RANDLORA_UNWATCHED inline Values product(const Values& left, const Values& right, int64_t M,
                                         int64_t N, int64_t K, bool lines, double scale = 1,
                                         bool by_column = false) {
  Values sums(M * N, 0);
  const double *a = left.data(), *b = right.data();
  double* out = sums.data();
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) {
      const double l = scale * a[by_column ? k * M + m : m * K + k];
      const double* row = lines ? b + k : b + k * N;
      const int64_t step = lines ? K : 1;
      for (int64_t i = 0; i < N; ++i) out[m * N + i] += l * row[i * step];
    }
  return sums;
}

// |got - want| / |want| in the 2-norm; NaN (which no bound accepts) when an element is.
RANDLORA_UNWATCHED inline double relative_error(const Values& got, const Values& want) {
  if (got.size() != want.size()) return NAN;
  const double *g = got.data(), *w = want.data();
  double error = 0, norm = 0;
  for (size_t i = 0, count = want.size(); i < count; ++i) {
    error += (g[i] - w[i]) * (g[i] - w[i]);
    norm += w[i] * w[i];
  }
  return error == 0 ? 0 : std::sqrt(error / norm);
}

// The bound of the error rule for one rounding of inputs, intermediates and result.
inline double tolerance(DType dtype) {
  switch (dtype) {
    case DType::f64: return 1e-13;
    case DType::bf16: return 1e-2;
    case DType::f16: return 2e-3;
    default: return 1e-5;
  }
}

inline void compare(const char* what, const Array& got, const Values& want, double bound) {
  const double error = relative_error(got.values(), want);
  EXPECT(error <= bound, "%s: %.2e,", what, error);
}

}  // namespace randlora
