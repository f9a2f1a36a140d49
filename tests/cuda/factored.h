// What the tests of the factored path share: a random basis in "device" memory, and plain sums.
#pragma once
#include "check.h"
#include "test_device.h"
#include "thread_runtime.h"

namespace randlora {

inline std::vector<double> normal_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> v(count);
  for (double& x : v) x = float(normal(random));
  return v;
}

// Lists in memory of exactly their size.
class DeviceLists {
 public:
  DeviceLists(const Ternary::OwnedLists& lists, bool wide)
      : count_(lists.offset.back()),
        offset_(int64_t(lists.offset.size()) * 8),
        index_(count_ * (wide ? 4 : 2)) {
    std::memcpy(offset_.get(), lists.offset.data(), lists.offset.size() * 8);
    if (count_ > 0)
      std::memcpy(index_.get(),
                  wide ? static_cast<const void*>(lists.wide.data()) : lists.narrow.data(),
                  count_ * (wide ? 4 : 2));
  }
  AnyLists view() const {
    return {static_cast<const int64_t*>(offset_.get()), index_.get(), count_};
  }

 private:
  int64_t count_;
  Poisoned offset_, index_;
};

// A basis of one layer shape, packed as lists, and its dense matrices.
struct Factored {
  int64_t D, d, r, n, K;
  bool wide;
  Ternary A, B;
  DeviceLists a, b_rows, b_cols;
  Basis basis;

  Factored(int64_t D_, int64_t d_, int64_t r_, double density, bool wide_ = false)
      : Factored(D_, d_, r_, density, wide_, ThreadRuntime(1)) {}

  // A'[c, k] for given lambda (K) and gamma (n, d).
  std::vector<double> scaled(const std::vector<double>& lam, const std::vector<double>& gam) const {
    std::vector<double> S(K * d);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k)
        S[c * d + k] = lam[c] * A.dense[c / n * d + k] * gam[c % n * d + k];
    return S;
  }

 private:
  Factored(int64_t D_, int64_t d_, int64_t r_, double density, bool wide_, ThreadRuntime&& rt)
      : D(D_),
        d(d_),
        r(r_),
        n((d + r - 1) / r),
        K(r * n),
        wide(wide_),
        A(r, d, density, unsigned(d + r), rt),
        B(D, K, density, unsigned(D + r), rt),
        a(A.by_row, wide),
        b_rows(B.by_row, wide),
        b_cols(B.by_column, wide) {
    basis.D = D, basis.d = d, basis.r = r, basis.n = n, basis.wide = wide;
    basis.a = a.view(), basis.b_rows = b_rows.view(), basis.b_cols = b_cols.view();
  }
};

// out (M, N) = scale * left (M, K) right (K, N), right transposed where `lines` (it is (N, K) then);
// left (K, M) transposed where `by_column`.
inline std::vector<double> product(const std::vector<double>& left,
                                   const std::vector<double>& right, int64_t M, int64_t N,
                                   int64_t K, bool lines, double scale = 1,
                                   bool by_column = false) {
  std::vector<double> out(M * N, 0);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) {
      const double l = scale * left[by_column ? k * M + m : m * K + k];
      for (int64_t i = 0; i < N; ++i) out[m * N + i] += l * right[lines ? i * K + k : k * N + i];
    }
  return out;
}

inline std::vector<double> sum(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

}  // namespace randlora
