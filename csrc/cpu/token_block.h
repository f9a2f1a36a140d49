// Token blocks: the layout in which the factored kernels compute.
//
// A block holds TB tokens of F features as [feature][token], so one feature of all its tokens is NV
// whole vectors. Every product of the factored path then multiplies vectors by scalars: no sum
// crosses lanes, and a token's result does not depend on its block or on TB.
#pragma once
#include "../core/runtime.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

template <class C_, int Bytes, int NV_>
struct Block {
  using C = C_;
  using V = Vec<C, Bytes>;
  static constexpr int L = Bytes / int(sizeof(C));
  static constexpr int NV = NV_;
  static constexpr int TB = L * NV;
};

// Calls fn(Block<...>{}) with a block type for T tokens. The choice depends on T alone: gradients
// are summed block by block and must not change with the thread count. A single block is computed
// by one thread.
template <class F>
RANDLORA_INLINE void with_block(DType dtype, int64_t tokens, Runtime& rt, const F& fn) {
  const auto call = [&](auto block) {
    rt.set_single(tokens <= block.TB);
    fn(block);
  };
  const auto choose = [&](auto compute) {
    using C = decltype(compute);
    constexpr int lanes = kVectorBytes / int(sizeof(C));
    if (tokens > 4 * lanes) return call(Block<C, kVectorBytes, 2>{});
    if constexpr (kVectorBytes >= 32) {
      if (tokens <= lanes / 2) return call(Block<C, kVectorBytes / 2, 1>{});
    }
    call(Block<C, kVectorBytes, 1>{});
  };
  dtype == DType::f64 ? choose(double{}) : choose(float{});
}

// z[f][t] = x[t][f] for `tokens` <= TB rows of x (row stride `ld`); absent tokens become zero.
template <class B, class S>
void load_block_from(const S* x, int64_t ld, int64_t tokens, int64_t features, typename B::C* z) {
  using C = typename B::C;
  using V = typename B::V;
  for (int v = 0; v < B::NV; ++v) {
    const int64_t first = v * B::L;
    const int64_t have = tokens - first;
    int64_t f = 0;
    for (; f + B::L <= features; f += B::L) {
      V m[B::L];
      unrolled<B::L>([&](auto t) { m[t] = t < have ? load_as<V>(x + (first + t) * ld + f) : V{}; });
      transpose<B::L>(m);
      unrolled<B::L>([&](auto t) { store(z + (f + t) * B::TB + first, m[t]); });
    }
    for (; f < features; ++f)
      for (int t = 0; t < B::L; ++t)
        z[f * B::TB + first + t] = t < have ? C(widen(x[(first + t) * ld + f])) : C(0);
  }
}

// y[t][f] = scale * z[f][t], added to y if `accumulate`, rounded once.
template <class B, class S>
void store_block_to(const typename B::C* z, typename B::C scale, bool accumulate, int64_t tokens,
                    int64_t features, S* y, int64_t ld) {
  using C = typename B::C;
  using V = typename B::V;
  for (int v = 0; v < B::NV; ++v) {
    const int64_t first = v * B::L;
    const int64_t have = tokens - first < B::L ? tokens - first : B::L;
    int64_t f = 0;
    for (; f + B::L <= features; f += B::L) {
      V m[B::L];
      unrolled<B::L>([&](auto l) { m[l] = load<V>(z + (f + l) * B::TB + first) * scale; });
      transpose<B::L>(m);
      unrolled<B::L>([&](auto t) {
        S* to = y + (first + t) * ld + f;
        if (t < have) store_as(to, accumulate ? load_as<V>(to) + m[t] : m[t]);
      });
    }
    // A product and a sum as above, not a fused operation: a feature's last bit must not depend on
    // whether L divides the number of features.
    for (; f < features; ++f) {
      const V m = load<V>(z + f * B::TB + first) * scale;
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
  using B = Block<C, kVectorBytes, 1>;
  using V = typename B::V;
  for (int64_t q = 0; q < width; q += B::L) {
    int64_t c = 0;
    for (; c + B::L <= cols && q + B::L <= width; c += B::L) {
      V m[B::L];
      unrolled<B::L>(
          [&](auto l) { m[l] = q + l < rows ? load<V>(from + (q + l) * ldf + c) : V{}; });
      transpose<B::L>(m);
      unrolled<B::L>([&](auto l) { store(to + (c + l) * ldt + q, m[l]); });
    }
    for (; c < cols; ++c)
      for (int64_t l = q; l < q + B::L && l < width; ++l)
        to[c * ldt + l] = l < rows ? from[l * ldf + c] : C(0);
  }
}

// load and store for a (T, ld) matrix of `dtype`, whose compute type is B::C, starting at token `t`
// and feature `f`.
template <class B, class F>
RANDLORA_INLINE void with_storage(DType dtype, const F& fn) {
  with_dtype(dtype, [&](auto s) {
    if constexpr (std::is_same_v<ComputeOf<decltype(s)>, typename B::C>) fn(s);
  });
}
template <class B>
RANDLORA_INLINE void load_block(const void* x, DType dtype, int64_t t, int64_t ld, int64_t tokens,
                                typename B::C* z) {
  with_storage<B>(dtype, [&](auto s) {
    load_block_from<B>(static_cast<const decltype(s)*>(x) + t * ld, ld, tokens, ld, z);
  });
}
template <class B>
RANDLORA_INLINE void store_block(const typename B::C* z, typename B::C scale, bool accumulate,
                                 int64_t tokens, int64_t features, void* y, DType dtype, int64_t t,
                                 int64_t ld, int64_t f) {
  with_storage<B>(dtype, [&](auto s) {
    store_block_to<B>(z, scale, accumulate, tokens, features,
                      static_cast<decltype(s)*>(y) + t * ld + f, ld);
  });
}

}  // namespace randlora::RANDLORA_ISA
