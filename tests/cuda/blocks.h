// Block bases in "device" memory, and their dW by plain loops in double.
#pragma once
#include <random>

#include "core/operators.h"
#include "test_device.h"

namespace randlora {

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// A layer, or its slice of some chunks of d and D.
struct BlockCase {
  int64_t D, d, r, G;  // of the layer
  int64_t skip = 0;    // elements that take the alignment of every matrix away
  int64_t a_first = 0, a_chunks = 0, b_first = 0, b_chunks = 0;  // 0 chunks: all
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
  BlockSizes sizes;
  int64_t D, d, K, height, width, words;
  std::vector<double> lam, gam;
  Poisoned a, planes;

  static BlockSizes sizes_of(const BlockCase& c) {
    const int64_t P = c.a_chunks ? c.a_chunks : c.G, Q = c.b_chunks ? c.b_chunks : c.G;
    const int64_t n = (c.d + c.r - 1) / c.r, phase = c.a_first * (c.r * n / c.G) % c.G;
    return {c.D / c.G * Q, c.d / c.G * P, c.r / c.G * P, n, c.G, P, Q, c.b_first - phase};
  }
  explicit BlockProblem(const BlockCase& c_)
      : c(c_),
        sizes(sizes_of(c)),
        D(sizes.D),
        d(sizes.d),
        K(sizes.K()),
        height(sizes.b_width()),
        width(sizes.a_width()),
        words(words_of(height)),
        // As they are in training: their products are far below float16's range.
        lam(random_values(K, 3, 1e-4)),
        gam(random_values(sizes.n * d, 4, 1e-3)),
        a(sizes.r * width),
        planes(sizes.rows() * words * 8) {
    std::mt19937 random(5);
    for (int64_t e = 0; e < sizes.r * width; ++e) signs()[e] = random() % 2 ? 1 : -1;
    for (int64_t row = 0; row < sizes.rows(); ++row)
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t bits = uint64_t{random()} << 32 | random();
        const int64_t left = height - w * 64;
        const uint64_t mask = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
        plus()[row * words + w] = bits & mask;
      }
  }
  int8_t* signs() const { return static_cast<int8_t*>(a.get()); }
  uint64_t* plus() const { return static_cast<uint64_t*>(planes.get()); }
  // The row e of B's planes that is row c of A' and in the chunk of o; -1 if there is none.
  int64_t row_of(int64_t o, int64_t row) const {
    for (int64_t e = o / height; e < sizes.rows(); e += sizes.b_chunks)
      if (sizes.row(e) == row) return e;
    return -1;
  }
  // Whether column c of B and row c of A' reach (o, k).
  bool meet(int64_t o, int64_t row, int64_t k) const {
    return row_of(o, row) >= 0 && row / sizes.n / (sizes.r / sizes.a_chunks) == k / width;
  }
  double b(int64_t o, int64_t row) const {
    return plus()[row_of(o, row) * words + o % height / 64] >> (o % height % 64) & 1 ? 1 : -1;
  }
  int64_t at(int64_t o, int64_t k, bool transposed) const {
    return transposed ? k * D + o : o * d + k;
  }
  std::vector<double> delta(double scale, bool transposed) const {
    std::vector<double> dW(D * d, 0.0);
    for (int64_t o = 0; o < D; ++o)
      for (int64_t row = 0; row < K; ++row) {
        if (row_of(o, row) < 0) continue;
        const double factor = scale * b(o, row) * lam[row];
        for (int64_t k = 0; k < d; ++k)
          if (row / sizes.n / (sizes.r / sizes.a_chunks) == k / width)
            dW[at(o, k, transposed)] +=
                factor * signs()[row / sizes.n * width + k % width] * gam[row % sizes.n * d + k];
      }
    return dW;
  }
  Blocks blocks() const { return {sizes, {plus(), nullptr, words}, signs()}; }
};

}  // namespace randlora
