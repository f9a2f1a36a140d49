// The class products of Hadamard bases in float32 and float64 (core/hadamard.h). Every sum runs in
// order, so bits depend neither on the tile nor on the thread that computes it.
#pragma once
#include "hadamard.h"

namespace randlora {
namespace RANDLORA_ISA {

// A tile's rows: with two vectors of columns, its sums and their operands fill the registers.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;

// Element (a, b) of a matrix whose rows and columns are any distance apart.
template <class C>
struct Strided {
  const C* data;
  int64_t row, column;
};

// put(row, column, sum) for each vector of the product of `left` (A, depth) and `right` (depth, NV
// vectors), of whose rows `readable` numbers may be read.
template <int A, int NV, bool all_readable, class C, class F>
RANDLORA_INLINE void tile(Strided<C> left, const C* right, int64_t next, int64_t depth,
                          int64_t readable, const F& put) {
  using V = Vec<C>;
  constexpr int L = sizeof(V) / sizeof(C);
  V sum[A][NV] = {};
  for (int64_t b = 0; b < depth; ++b, right += next, left.data += left.column) {
    V r[NV];
    unrolled<NV>([&](auto v) RANDLORA_INLINED {
      r[v] = all_readable ? load<V>(right + v * L) : load_some<V>(right + v * L, readable - v * L);
    });
    unrolled<A>([&](auto a) RANDLORA_INLINED {
      const C l = left.data[a * left.row];
      unrolled<NV>([&](auto v) RANDLORA_INLINED { sum[a][v] = add_product(sum[a][v], l, r[v]); });
    });
  }
  unrolled<A>([&](auto a) RANDLORA_INLINED {
    unrolled<NV>([&](auto v) RANDLORA_INLINED { put(int64_t(a), int64_t(v) * L, sum[a][v]); });
  });
}

template <int A, int NV, bool all_readable, class C, class F>
RANDLORA_INLINE void tiles(Strided<C> left, int64_t rows, const C* right, int64_t next,
                           int64_t depth, int64_t readable, const F& put, int64_t first = 0) {
  for (; first + A <= rows; first += A)
    tile<A, NV, all_readable>(Strided<C>{left.data + first * left.row, left.row, left.column},
                              right, next, depth, readable,
                              [&](int64_t a, int64_t c, Vec<C> v) { put(first + a, c, v); });
  if constexpr (A > 1)
    tiles<A / 2, NV, all_readable>(left, rows, right, next, depth, readable, put, first);
}

// As `tile`, for any number of rows and columns. Lanes behind the last column hold anything.
template <class C, class F>
RANDLORA_INLINE void multiply(Strided<C> left, int64_t rows, const C* right, int64_t next,
                              int64_t columns, int64_t depth, int64_t readable, const F& put) {
  constexpr int L = kVectorBytes / int(sizeof(C));
  for (int64_t c = 0; c < columns; c += 2 * L) {
    const auto at = [&](int64_t a, int64_t k, Vec<C> v) { put(a, c + k, v); };
    const bool two = columns - c > L;
    if (c + (two ? 2 * L : L) > readable)
      tiles<kTileRows, 2, false>(left, rows, right + c, next, depth, readable - c, at);
    else if (two)
      tiles<kTileRows, 2, true>(left, rows, right + c, next, depth, readable - c, at);
    else
      tiles<kTileRows, 1, true>(left, rows, right + c, next, depth, readable - c, at);
  }
}

// The columns [begin, end) of one class, the first of which has that place in its class.
struct ClassColumns {
  int64_t begin, end, place;

  RANDLORA_HOST_MEMBER ClassColumns(const HadamardSizes& s, int64_t m) {
    const int64_t first = (s.first_class() + m) * s.n - s.first_column;
    begin = first < 0 ? 0 : first;
    end = first + s.n < s.d ? first + s.n : s.d;
    place = begin - first;
  }
  RANDLORA_HOST_MEMBER int64_t count() const { return end - begin; }
};

// Below this many multiply-adds one thread is faster than two.
constexpr int64_t kProductsOneThread = 1 << 21;

template <class C>
void hadamard_inner_as(const HadamardInner& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d;
  const C *x = static_cast<const C*>(p.x), *gam = static_cast<const C*>(p.columns);
  C* z = static_cast<C*>(p.z);
  rt.set_single(p.T * d * n < kProductsOneThread);
  rt.split(p.T, kTileRows, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < s.classes(); ++m) {
      const ClassColumns of(s, m);
      C* to = z + (m * p.T + begin) * n;
      multiply(Strided<C>{x + begin * d + of.begin, d, 1}, end - begin, gam + of.begin * n, n, n,
               of.count(), INT64_MAX,
               [&](int64_t t, int64_t i, Vec<C> v) { store_some(to + t * n + i, v, n - i); });
    }
  });
}

template <class C>
void hadamard_outer_as(const HadamardOuter& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const C *w = static_cast<const C*>(p.w), *gam = static_cast<const C*>(p.gam);
  C* y = static_cast<C*>(p.y);
  rt.set_single(p.T * d * n < kProductsOneThread);
  C* sign = static_cast<C*>(rt.scratch(size_t(d + L) * sizeof(C)));
  for (int64_t k = 0; k < d; ++k) sign[k] = C(p.scale) * C(p.s[k]);
  rt.split(p.T, kTileRows, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < s.classes(); ++m) {
      const ClassColumns of(s, m);
      C* to = y + begin * d + of.begin;
      multiply(Strided<C>{w + (m * p.T + begin) * n, n, 1}, end - begin, gam + of.begin, d,
               of.count(), n, d - of.begin, [&](int64_t t, int64_t k, Vec<C> v) {
                 C* at = to + t * d + k;
                 const int64_t count = of.count() - k;
                 const Vec<C> signs = load<Vec<C>>(sign + of.begin + k);
                 store_some(
                     at, p.accumulate ? fused(v, signs, load_some<Vec<C>>(at, count)) : v * signs,
                     count);
               });
    }
  });
}

template <class C>
void hadamard_gradient_as(const HadamardGradient& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d, blocks = (n + kTileRows - 1) / kTileRows;
  const C *w = static_cast<const C*>(p.w), *x = static_cast<const C*>(p.x);
  C* P = static_cast<C*>(p.P);
  rt.set_single(p.T * d * n < kProductsOneThread);
  rt.split(s.classes() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end;) {
      const int64_t m = share / blocks, first = share % blocks;
      const int64_t stop = first + end - share < blocks ? first + end - share : blocks;
      const int64_t i = first * kTileRows, rows = (stop * kTileRows < n ? stop * kTileRows : n) - i;
      const ClassColumns of(s, m);
      C* to = P + (m * n + i) * n + of.place;
      multiply(Strided<C>{w + m * p.T * n + i, 1, n}, rows, x + of.begin, d, of.count(), p.T,
               d - of.begin, [&](int64_t a, int64_t k, Vec<C> v) {
                 C* at = to + a * n + k;
                 const int64_t count = of.count() - k;
                 store_some(at, p.accumulate ? v + load_some<Vec<C>>(at, count) : v, count);
               });
      share += stop - first;
    }
  });
}

template <class F>
RANDLORA_INLINE void with_compute_type(DType dtype, const F& fn) {
  dtype == DType::f64 ? fn(double{}) : fn(float{});
}
inline void hadamard_inner(const HadamardInner& p, Runtime& rt) {
  with_compute_type(p.dtype, [&](auto c) { hadamard_inner_as<decltype(c)>(p, rt); });
}
inline void hadamard_outer(const HadamardOuter& p, Runtime& rt) {
  with_compute_type(p.dtype, [&](auto c) { hadamard_outer_as<decltype(c)>(p, rt); });
}
inline void hadamard_gradient(const HadamardGradient& p, Runtime& rt) {
  with_compute_type(p.dtype, [&](auto c) { hadamard_gradient_as<decltype(c)>(p, rt); });
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
