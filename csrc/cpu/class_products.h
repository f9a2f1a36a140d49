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
    __builtin_prefetch(right + NV * L);  // where the next tile begins
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

// to = factor * v, or to += ... if `accumulate`; up to `count` lanes.
template <class C>
RANDLORA_INLINE void put_scaled(C* to, Vec<C> v, const C* factor, bool accumulate, int64_t count) {
  const Vec<C> f = load<Vec<C>>(factor);
  store_some(to, accumulate ? fused(v, f, load_some<Vec<C>>(to, count)) : v * f, count);
}

// The columns [begin, end) of one class.
struct ClassColumns {
  int64_t begin, end;

  RANDLORA_HOST_MEMBER ClassColumns(const HadamardSizes& s, int64_t m) {
    const int64_t first = (s.first_class() + m) * s.n - s.first_column;
    begin = first < 0 ? 0 : first;
    end = first + s.n < s.d ? first + s.n : s.d;
  }
  RANDLORA_HOST_MEMBER int64_t count() const { return end - begin; }
};

// Below this many multiply-adds one thread is faster than two.
constexpr int64_t kProductsOneThread = 1 << 21;

// fn(class, first token, behind the last) for all of them, on all threads: few tokens are not
// split, because every share of them reads gamma.
template <class F>
RANDLORA_INLINE void split_classes(const HadamardSizes& s, int64_t T, Runtime& rt, const F& fn) {
  const auto classes = [&](int64_t begin, int64_t end, int64_t t0, int64_t t1) {
    for (int64_t m = begin; m < end; ++m) fn(m, t0, t1);
  };
  if (T <= s.n)
    rt.split(s.classes(), 1, [&](int64_t begin, int64_t end) { classes(begin, end, 0, T); });
  else
    rt.split(T, kTileRows, [&](int64_t t0, int64_t t1) { classes(0, s.classes(), t0, t1); });
}

// For few tokens: gamma is read once, in order, and the tokens are the lanes.
template <class C>
void inner_of_few(const HadamardInner& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d, T = p.T;
  constexpr int L = kVectorBytes / int(sizeof(C));
  const C *x = static_cast<const C*>(p.x), *gam = static_cast<const C*>(p.gam);
  C* z = static_cast<C*>(p.z);
  // x with the signs as (d, T); the products of a class as (n, T), for each thread.
  const int64_t of_thread = n * T + L, width = rt.width();
  C* columns =
      static_cast<C*>(rt.scratch(size_t(d + 2 * L + d * T + L + width * of_thread) * sizeof(C)));
  C *sign = columns + d * T + L, *one = sign + d + L, *products = one + L;
  for (int64_t k = 0; k < d; ++k) sign[k] = C(p.s[k]);
  for (int l = 0; l < L; ++l) one[l] = 1, sign[d + l] = 0;
  rt.split(d, L, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += L)
      transpose_columns(x + k, T, d, d - k, sign + k, columns + k * T);
  });
  const int64_t shares = s.classes() < width ? s.classes() : width;
  rt.each_slot(int(shares), [&](int64_t share) {
    C* own = products + share * of_thread;
    for (int64_t m = s.classes() * share / shares; m < s.classes() * (share + 1) / shares; ++m) {
      const ClassColumns of(s, m);
      multiply(Strided<C>{gam + of.begin, d, 1}, n, columns + of.begin * T, T, T, of.count(),
               INT64_MAX,
               [&](int64_t i, int64_t t, Vec<C> v) { store_some(own + i * T + t, v, T - t); });
      for (int64_t t = 0; t < T; t += L)
        transpose_columns(own + t, n, T, T - t, one, z + (m * T + t) * n);
    }
  });
}

template <class C>
void hadamard_inner_as(const HadamardInner& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d;
  rt.set_single(p.T * d * n < kProductsOneThread);
  if (!p.columns) return inner_of_few<C>(p, rt);
  const C *x = static_cast<const C*>(p.x), *columns = static_cast<const C*>(p.columns);
  C* z = static_cast<C*>(p.z);
  split_classes(s, p.T, rt, [&](int64_t m, int64_t t0, int64_t t1) {
    const ClassColumns of(s, m);
    C* to = z + (m * p.T + t0) * n;
    multiply(Strided<C>{x + t0 * d + of.begin, d, 1}, t1 - t0, columns + of.begin * n, n, n,
             of.count(), INT64_MAX,
             [&](int64_t t, int64_t i, Vec<C> v) { store_some(to + t * n + i, v, n - i); });
  });
}

// scale * s, with room for a vector behind.
template <class C>
RANDLORA_INLINE const C* scaled_signs(const int8_t* s, int64_t d, double scale, Runtime& rt) {
  constexpr int L = kVectorBytes / int(sizeof(C));
  C* sign = static_cast<C*>(rt.scratch(size_t(d + L) * sizeof(C)));
  for (int64_t k = 0; k < d; ++k) sign[k] = C(scale) * C(s[k]);
  for (int l = 0; l < L; ++l) sign[d + l] = 0;
  return sign;
}

template <class C>
void hadamard_outer_as(const HadamardOuter& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d;
  const C *w = static_cast<const C*>(p.w), *gam = static_cast<const C*>(p.gam);
  C* y = static_cast<C*>(p.y);
  rt.set_single(p.T * d * n < kProductsOneThread);
  const C* sign = scaled_signs<C>(p.s, d, p.scale, rt);
  split_classes(s, p.T, rt, [&](int64_t m, int64_t t0, int64_t t1) {
    const ClassColumns of(s, m);
    C* to = y + t0 * d + of.begin;
    multiply(Strided<C>{w + (m * p.T + t0) * n, n, 1}, t1 - t0, gam + of.begin, d, of.count(), n,
             d - of.begin, [&](int64_t t, int64_t k, Vec<C> v) {
               put_scaled(to + t * d + k, v, sign + of.begin + k, p.accumulate, of.count() - k);
             });
  });
}

template <class C>
void hadamard_gradient_as(const HadamardGradient& p, Runtime& rt) {
  const HadamardSizes& s = p.sizes;
  const int64_t n = s.n, d = s.d, blocks = (n + kTileRows - 1) / kTileRows;
  const C *w = static_cast<const C*>(p.w), *x = static_cast<const C*>(p.x);
  C* dgam = static_cast<C*>(p.dgam);
  rt.set_single(p.T * d * n < kProductsOneThread);
  const C* sign = scaled_signs<C>(p.s, d, p.scale, rt);
  rt.split(s.classes() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end;) {
      const int64_t m = share / blocks, first = share % blocks;
      const int64_t stop = first + end - share < blocks ? first + end - share : blocks;
      const int64_t i = first * kTileRows, rows = (stop * kTileRows < n ? stop * kTileRows : n) - i;
      const ClassColumns of(s, m);
      C* to = dgam + i * d + of.begin;
      multiply(Strided<C>{w + m * p.T * n + i, 1, n}, rows, x + of.begin, d, of.count(), p.T,
               d - of.begin, [&](int64_t a, int64_t k, Vec<C> v) {
                 put_scaled(to + a * d + k, v, sign + of.begin + k, p.accumulate, of.count() - k);
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
