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
// one for each number. In global memory:
template <class T>
struct Walk {
  T* at;
  int64_t step;
  __device__ __forceinline__ void skip(int64_t ranks) { at += ranks * step; }
  __device__ __forceinline__ T* next() {
    T* here = at;
    at += step;
    return here;
  }
};
// The numbers j * n + i of a row, for one i and the ranks j from 0 on.
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

// v[e] = sum over k < end of H[block * M + e, k] x[k]. `walk` has x from rank 0 on.
template <int M, class C, class Numbers>
__device__ __forceinline__ void mix(C (&v)[M], int block, int end, Numbers walk) {
  if (M <= end) {
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
      if (from + e < end) v[e] += negative ? -widen(*at) : widen(*at);
    }
  }
  hadamard<1>(v);
}

// Calls fn with a constant M, the ranks of a block.
template <class C, class F>
__device__ __forceinline__ void with_ranks(int64_t r, const F& fn) {
  if (kValues<C> == 16 || r <= 16)
    fn(std::integral_constant<int, 16>{});
  else
    fn(std::integral_constant<int, kValues<C>>{});
}

// rows[t - t0, j * n + i] = sum over m of H[j, m] z[m, t, i], for `tokens` tokens t from t0 on. In
// z (classes, T, n), bases of successive tokens are adjacent.
template <class Z, class C = ComputeOf<Z>>
__device__ __forceinline__ void write_mixed(const HadamardSizes& sizes, const void* z, int64_t T,
                                            const Rows<C>& rows, int log, int64_t t0, int tokens) {
  const int64_t stride = T * sizes.n;
  const Z* numbers = static_cast<const Z*>(z) + t0 * sizes.n;
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r), columns = tokens * n;
  const int classes = static_cast<int>(sizes.classes());
  with_ranks<C>(sizes.r, [&](auto m) {
    constexpr int M = decltype(m)::value;
    const int items = columns * ((r + M - 1) / M);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int block = item / columns, q = item - block * columns, t = q / n;
      C v[M];
      mix(v, block, classes, Walk<const Z>{numbers + q, stride});
      RowWalk<C> to{rows.row(t, log), q - t * n, n};
      to.skip(block * M);
#pragma unroll
      for (int e = 0; e < M; ++e) {
        C* at = to.next();
        if (block * M + e < r) *at = v[e];
      }
    }
  });
}

}  // namespace randlora::cuda
