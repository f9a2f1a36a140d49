// The transform over the rank indices: for one token and one base i, r numbers become r others.
//
// A thread holds M of the results, those of ranks block * M .. block * M + M - 1, and reads all the
// r numbers, M at a time: over the bits below M it transforms them in registers, and over the bits
// above it adds them with the sign that H has for the two blocks. So ranks up to kValues need one
// block, each number is read once, and larger ranks need no memory for anything in between.
#pragma once
#include "transform.h"

namespace randlora {
namespace cuda {

__device__ __forceinline__ bool minus(int64_t a, int64_t b) {
  return __popcll(static_cast<unsigned long long>(a & b)) & 1;
}

// v[e] = sum over k of H[block * M + e, k] load(k), for begin <= k < end.
template <int M, class C, class Load>
__device__ __forceinline__ void mix(C (&v)[M], int64_t block, int64_t begin, int64_t end,
                                    const Load& load) {
#pragma unroll
  for (int e = 0; e < M; ++e) v[e] = C(0);
#pragma unroll 1
  for (int64_t from = begin / M * M; from < end; from += M) {
    C x[M];  // all loads before the first use
    if (from >= begin && from + M <= end) {
#pragma unroll
      for (int e = 0; e < M; ++e) x[e] = load(from, e);
    } else {
#pragma unroll
      for (int e = 0; e < M; ++e) x[e] = from + e >= begin && from + e < end ? load(from, e) : C(0);
    }
    if (minus(block, from / M)) {
#pragma unroll
      for (int e = 0; e < M; ++e) v[e] -= x[e];
    } else {
#pragma unroll
      for (int e = 0; e < M; ++e) v[e] += x[e];
    }
  }
  hadamard<1>(v);
}

// Elements of a row at c = j * n + i, for one i: successive j are a constant distance apart if n is
// a multiple of kValues (Even).
template <class C, bool Scratch, bool Even>
struct Strided {
  Rows<C, Scratch> row;
  int i, n;
  __device__ __forceinline__ C& at(int from, int e) const {
    if constexpr (Even) return row.in_row(i + from * n)[e * (n + n / kValues<C> * row.kFree)];
    return *row.in_row(i + (from + e) * n);
  }
};

// Calls fn with constants: M, the ranks of a block, and whether n is a multiple of kValues.
template <class C, class F>
__device__ __forceinline__ void with_constants(const HadamardSizes& sizes, const F& fn) {
  const auto with_ranks = [&](auto even) {
    if constexpr (kValues<C> == 16)
      fn(std::integral_constant<int, 16>{}, even);
    else if (sizes.r <= 16)
      fn(std::integral_constant<int, 16>{}, even);
    else
      fn(std::integral_constant<int, 32>{}, even);
  };
  if (sizes.n % kValues<C> == 0)
    with_ranks(std::true_type{});
  else
    with_ranks(std::false_type{});
}

// rows[t - t0, j * n + i] = sum over m of H[j, m] z[m, t, i], for `tokens` tokens t from t0 on. In
// z (classes, T, n), bases of successive tokens are adjacent.
template <class S, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void write_mixed(const HadamardSizes& sizes, const void* z, int64_t T,
                                            const Rows<C, Scratch>& rows, int log, int64_t t0,
                                            int64_t tokens, const Share& share) {
  using Index = typename Rows<C, Scratch>::Index;
  const int64_t stride = T * sizes.n, first_class = sizes.first_class(),
                end_class = first_class + sizes.classes();
  const S* numbers = static_cast<const S*>(z) + t0 * sizes.n - first_class * stride;
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r);
  const Index columns = Index(tokens) * n;
  with_constants<C>(sizes, [&](auto m, auto even) {
    constexpr int M = decltype(m)::value;
    const Index items = columns * ((r + M - 1) / M);
    for (Index item = Index(share.first); item < items; item += Index(share.step)) {
      const int block = static_cast<int>(item / columns);
      const Index q = item - block * columns, t = q / n;
      C v[M];
      mix(v, block, first_class, end_class,
          [&](int64_t from, int e) { return widen(numbers[q + from * stride + e * stride]); });
      const Strided<C, Scratch, decltype(even)::value> to{rows.row(t, log),
                                                          static_cast<int>(q - t * n), n};
#pragma unroll
      for (int e = 0; e < M; ++e)
        if (block * M + e < r) to.at(block * M, e) = v[e];
    }
  });
}

}  // namespace cuda
}  // namespace randlora
