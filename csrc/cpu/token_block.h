// Token blocks: the layout in which the kernels of independent bases compute.
//
// A block holds a few tokens as [feature][token], so one feature of all its tokens is kVectors
// whole vectors. Every product then multiplies vectors by scalars: no sum
// crosses lanes, and a token's result does not depend on its block.
#pragma once
#include "simd.h"

namespace randlora::RANDLORA_ISA {

template <class C_, int Bytes, int Vectors>
struct TokenBlock {
  using C = C_;
  using Vector = Vec<C, Bytes>;
  static constexpr int kLanes = Bytes / int(sizeof(C));
  static constexpr int kVectors = Vectors;
  static constexpr int kTokens = kLanes * kVectors;
};

// Calls fn(TokenBlock<...>{}) with a type for T tokens. The choice depends on T alone: gradients
// are summed block by block and must not change with the thread count.
template <class F>
RANDLORA_INLINE void with_block(DType dtype, int64_t tokens, const F& fn) {
  const auto choose = [&](auto compute) {
    using C = decltype(compute);
    constexpr int lanes = kVectorBytes / int(sizeof(C));
    if (tokens > 4 * lanes) return fn(TokenBlock<C, kVectorBytes, 2>{});
    if constexpr (kVectorBytes >= 32) {
      if (tokens <= lanes / 2) return fn(TokenBlock<C, kVectorBytes / 2, 1>{});
    }
    fn(TokenBlock<C, kVectorBytes, 1>{});
  };
  dtype == DType::f64 ? choose(double{}) : choose(float{});
}

// z[f][t] = x[t][f] for `tokens` <= kTokens rows of x (row stride `ld`); absent tokens become zero.
template <class Block, class S>
void load_block_from(const S* x, int64_t ld, int64_t tokens, int64_t features,
                     typename Block::C* z) {
  using C = typename Block::C;
  using Vector = typename Block::Vector;
  for (int v = 0; v < Block::kVectors; ++v) {
    const int64_t first = v * Block::kLanes;
    const int64_t have = tokens - first;
    int64_t f = 0;
    for (; f + Block::kLanes <= features; f += Block::kLanes) {
      Vector m[Block::kLanes];
      unrolled<Block::kLanes>(
          [&](auto t) { m[t] = t < have ? load_as<Vector>(x + (first + t) * ld + f) : Vector{}; });
      transpose<Block::kLanes>(m);
      unrolled<Block::kLanes>([&](auto t) { store(z + (f + t) * Block::kTokens + first, m[t]); });
    }
    for (; f < features; ++f)
      for (int t = 0; t < Block::kLanes; ++t)
        z[f * Block::kTokens + first + t] = t < have ? C(widen(x[(first + t) * ld + f])) : C(0);
  }
}

// y[t][f] = scale * z[f][t], added to y if `accumulate`, rounded once.
template <class Block, class S>
void store_block_to(const typename Block::C* z, typename Block::C scale, bool accumulate,
                    int64_t tokens, int64_t features, S* y, int64_t ld) {
  using C = typename Block::C;
  using Vector = typename Block::Vector;
  for (int v = 0; v < Block::kVectors; ++v) {
    const int64_t first = v * Block::kLanes;
    const int64_t have = tokens - first < Block::kLanes ? tokens - first : Block::kLanes;
    int64_t f = 0;
    for (; f + Block::kLanes <= features; f += Block::kLanes) {
      Vector m[Block::kLanes];
      unrolled<Block::kLanes>(
          [&](auto l) { m[l] = load<Vector>(z + (f + l) * Block::kTokens + first) * scale; });
      transpose<Block::kLanes>(m);
      unrolled<Block::kLanes>([&](auto t) {
        S* to = y + (first + t) * ld + f;
        if (t < have) store_as(to, accumulate ? load_as<Vector>(to) + m[t] : m[t]);
      });
    }
    // A product and a sum as above, not a fused operation: a feature's last bit must not depend on
    // whether L divides the number of features.
    for (; f < features; ++f) {
      const Vector m = load<Vector>(z + f * Block::kTokens + first) * scale;
      for (int64_t t = 0; t < have; ++t) {
        S* to = y + (first + t) * ld + f;
        narrow(accumulate ? C(widen(*to)) + m[t] : m[t], to);
      }
    }
  }
}

// Transposes `from` (rows, cols) into `to` (cols, width), with zeros in columns [rows, width).
// ldf and ldt are their row strides.
template <class C>
void transpose_matrix(const C* from, int64_t ldf, int64_t rows, int64_t cols, C* to, int64_t ldt,
                      int64_t width) {
  using Block = TokenBlock<C, kVectorBytes, 1>;
  using Vector = typename Block::Vector;
  for (int64_t q = 0; q < width; q += Block::kLanes) {
    int64_t c = 0;
    for (; c + Block::kLanes <= cols && q + Block::kLanes <= width; c += Block::kLanes) {
      Vector m[Block::kLanes];
      unrolled<Block::kLanes>(
          [&](auto l) { m[l] = q + l < rows ? load<Vector>(from + (q + l) * ldf + c) : Vector{}; });
      transpose<Block::kLanes>(m);
      unrolled<Block::kLanes>([&](auto l) { store(to + (c + l) * ldt + q, m[l]); });
    }
    for (; c < cols; ++c)
      for (int64_t l = q; l < q + Block::kLanes && l < width; ++l)
        to[c * ldt + l] = l < rows ? from[l * ldf + c] : C(0);
  }
}

// load and store for a (T, ld) matrix of `dtype`, whose compute type is B::C, starting at token `t`
// and feature `f`.
template <class Block, class F>
RANDLORA_INLINE void with_storage(DType dtype, const F& fn) {
  with_dtype(dtype, [&](auto storage) {
    if constexpr (std::is_same_v<ComputeOf<decltype(storage)>, typename Block::C>) fn(storage);
  });
}
template <class Block>
RANDLORA_INLINE void load_block(const void* x, DType dtype, int64_t t, int64_t ld, int64_t tokens,
                                typename Block::C* z) {
  with_storage<Block>(dtype, [&](auto storage) {
    load_block_from<Block>(static_cast<const decltype(storage)*>(x) + t * ld, ld, tokens, ld, z);
  });
}
template <class Block>
RANDLORA_INLINE void store_block(const typename Block::C* z, typename Block::C scale,
                                 bool accumulate, int64_t tokens, int64_t features, void* y,
                                 DType dtype, int64_t t, int64_t ld, int64_t f) {
  with_storage<Block>(dtype, [&](auto storage) {
    store_block_to<Block>(z, scale, accumulate, tokens, features,
                          static_cast<decltype(storage)*>(y) + t * ld + f, ld);
  });
}

}  // namespace randlora::RANDLORA_ISA
