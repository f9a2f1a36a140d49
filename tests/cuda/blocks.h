// Block bases in "device" memory, and their dW by plain loops in double.
#pragma once
#include <random>

#include "core/operators.h"
#include "test_device.h"

namespace randlora {

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

struct BlockCase {
  int64_t D, d, r, G;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
};

inline std::vector<double> random_values(int64_t count, unsigned seed, double size) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, size);
  std::vector<double> v(count);
  for (double& x : v) x = float(normal(random));
  return v;
}

struct BlockProblem {
  BlockCase c;
  int64_t n, K, height, width, words;
  std::vector<double> lam, gam;
  Poisoned a, planes;

  explicit BlockProblem(const BlockCase& c_)
      : c(c_),
        n((c.d + c.r - 1) / c.r),
        K(c.r * n),
        height(c.D / c.G),
        width(c.d / c.G),
        words(words_of(height)),
        // As they are in training: their products are far below float16's range.
        lam(random_values(K, 3, 1e-4)),
        gam(random_values(n * c.d, 4, 1e-3)),
        a(c.r * width),
        planes(2 * K * words * 8) {
    std::mt19937 random(5);
    for (int64_t e = 0; e < c.r * width; ++e) signs()[e] = random() % 2 ? 1 : -1;
    for (int64_t row = 0; row < K; ++row)
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t bits = uint64_t{random()} << 32 | random();
        const int64_t left = height - w * 64;
        const uint64_t mask = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
        plus()[row * words + w] = bits & mask;
        plus()[(K + row) * words + w] = ~bits & mask;
      }
  }
  int8_t* signs() const { return static_cast<int8_t*>(a.get()); }
  uint64_t* plus() const { return static_cast<uint64_t*>(planes.get()); }
  // Whether column c of B and row c of A' reach (o, k).
  bool meet(int64_t o, int64_t row, int64_t k) const {
    return row % c.G == o / height && row / n / (c.r / c.G) == k / width;
  }
  double b(int64_t o, int64_t row) const {
    return plus()[row * words + o % height / 64] >> (o % height % 64) & 1 ? 1 : -1;
  }
  int64_t at(int64_t o, int64_t k, bool transposed) const {
    return transposed ? k * c.D + o : o * c.d + k;
  }
  std::vector<double> delta(double scale, bool transposed) const {
    std::vector<double> dW(c.D * c.d, 0.0);
    for (int64_t o = 0; o < c.D; ++o)
      for (int64_t row = 0; row < K; ++row)
        for (int64_t k = 0; k < c.d && row % c.G == o / height; ++k)
          if (meet(o, row, k))
            dW[at(o, k, transposed)] += scale * b(o, row) * lam[row] *
                                        signs()[row / n * width + k % width] *
                                        gam[row % n * c.d + k];
    return dW;
  }
  Blocks blocks() const {
    return {c.D, c.d, c.r, n, c.G, {plus(), plus() + K * words, words}, signs()};
  }
};

}  // namespace randlora
