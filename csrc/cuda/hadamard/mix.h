// The transform over the rank indices: for one token and one base i, r numbers become r others.
//
// A thread holds M of the results, those of ranks block * M .. block * M + M - 1, and reads all the
// r numbers, M at a time: over the bits below M it transforms them in registers, and over the bits
// above it adds them with the sign that H has for the two blocks. So ranks up to kValues need one
// block, each number is read once, and larger ranks need no memory for anything in between.
#pragma once
#include "transform.h"

namespace randlora::cuda {

__device__ __forceinline__ bool minus(int64_t a, int64_t b) {
  return __popcll(static_cast<unsigned long long>(a & b)) & 1;
}

// Walks: numbers whose ranks follow each other. An address that moves on takes fewer registers than
// one for each number.
template <class T, class Step>
struct Walk {
  T* at;
  Step step;
  __device__ __forceinline__ void skip(int ranks) { at += ranks * step; }
  __device__ __forceinline__ T* next() {
    T* here = at;
    at += step;
    return here;
  }
};
template <class C>
struct RowWalk {
  Rows<C> row;
  int c, n;
  __device__ __forceinline__ void skip(int ranks) { c += ranks * n; }
  __device__ __forceinline__ C* next() {
    C* here = row.at(c);
    c += n;
    return here;
  }
};
// The numbers j * n + i of a row, for one i and the ranks j from 0 on.
template <bool Whole, class C>
__device__ __forceinline__ auto walk_row(const Rows<C>& row, int i, int n) {
  if constexpr (Whole)
    return Walk<C, int>{row.at(i), n + n / kValues<C> * Rows<C>::kFree};
  else
    return RowWalk<C>{row, i, n};
}

// v[e] = sum over k < end of H[block * M + e, k] x[k]. `walk` has x from rank 0 on. Whole: M divides
// `end`.
template <bool Whole, int M, class C, class Numbers>
__device__ __forceinline__ void mix(C (&v)[M], int block, int end, Numbers walk) {
  if (Whole || M <= end) {
#pragma unroll
    for (int e = 0; e < M; ++e) v[e] = widen(*walk.next());
  } else {
#pragma unroll
    for (int e = 0; e < M; ++e) {
      const auto* at = walk.next();
      v[e] = e < end ? widen(*at) : C(0);
    }
  }
#pragma unroll 1
  for (int from = M; from < end; from += M) {
    const bool negative = minus(block, from / M);
#pragma unroll
    for (int e = 0; e < M; ++e) {
      const auto* at = walk.next();
      if (Whole || from + e < end) v[e] += negative ? -widen(*at) : widen(*at);
    }
  }
  hadamard<1>(v);
}

// Calls fn(M, Whole, block, t, i) for every base i of `tokens` tokens t and every block of M ranks,
// of `ranks`. Whole: all blocks have M ranks and classes, and rows no gap within a warp's bases.
template <class C, class F>
__device__ __forceinline__ void each_mix(const HadamardSizes& sizes, int64_t ranks, int tokens,
                                         const F& fn) {
  const int n = static_cast<int>(sizes.n), columns = tokens * n;
  const auto each = [&](auto m, auto whole) {
    constexpr int M = decltype(m)::value;
    const int items = columns * ((static_cast<int>(ranks) + M - 1) / M);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int block = items > columns ? item / columns : 0, q = item - block * columns;
      const int t = tokens > 1 ? q / n : 0;
      fn(m, whole, block, t, q - t * n);
    }
  };
  const auto with = [&](auto m) {
    constexpr int M = decltype(m)::value;
    if (sizes.r % M == 0 && sizes.classes() == sizes.r && n % kValues<C> == 0)
      each(m, std::true_type{});
    else
      each(m, std::false_type{});
  };
  if (kValues<C> == 16 || sizes.r <= 16)
    with(std::integral_constant<int, 16>{});
  else
    with(std::integral_constant<int, kValues<C>>{});
}

// rows[t - t0, j * n + i] = sum over m of H[j, m] z[m, t, i], for `tokens` tokens t from t0 on. In
// z (classes, T, n), bases of successive tokens are adjacent.
template <class Z, class C = ComputeOf<Z>>
__device__ __forceinline__ void write_mixed(const HadamardSizes& sizes, const void* z, int64_t T,
                                            const Rows<C>& rows, int log, int64_t t0, int tokens) {
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r);
  const int classes = static_cast<int>(sizes.classes());
  const Z* numbers = static_cast<const Z*>(z) + t0 * n;
  each_mix<C>(sizes, r, tokens, [&](auto m, auto whole, int block, int t, int i) {
    constexpr int M = decltype(m)::value;
    constexpr bool Whole = decltype(whole)::value;
    C v[M];
    mix<Whole>(v, block, classes, Walk<const Z, int64_t>{numbers + t * n + i, T * n});
    auto to = walk_row<Whole>(rows.row(t, log), i, n);
    to.skip(block * M);
#pragma unroll
    for (int e = 0; e < M; ++e) {
      C* at = to.next();
      if (Whole || block * M + e < r) *at = v[e];
    }
  });
}

}  // namespace randlora::cuda
