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
  for (int64_t from = begin / M; from * M < end; ++from) {
    const bool negative = minus(block, from);
    C x[M];
#pragma unroll
    for (int e = 0; e < M; ++e) {
      const int64_t k = from * M + e;
      x[e] = k >= begin && k < end ? load(k) : C(0);
    }
#pragma unroll
    for (int e = 0; e < M; ++e) v[e] += negative ? -x[e] : x[e];
  }
  hadamard<1>(v);
}

// Calls fn(M) with a constant M: the ranks of a block.
template <class C, class F>
__device__ __forceinline__ void with_block_of_ranks(int64_t r, const F& fn) {
  if (r <= 8)
    fn(std::integral_constant<int, 8>{});
  else if (r <= 16 || kValues<C> == 16)
    fn(std::integral_constant<int, 16>{});
  else
    fn(std::integral_constant<int, kValues<C>>{});
}

// z of some adjacent tokens, (classes, T, n), from token t0 on. Its column q is base q % n of token
// t0 + q / n.
template <class S>
struct Mixed {
  using C = typename ComputeOf<S>::type;
  int64_t n, stride, first_class, end_class;
  const S* numbers;

  __device__ __forceinline__ Mixed(const HadamardSizes& s, const void* z, int64_t T, int64_t t0)
      : n(s.n),
        stride(T * s.n),
        first_class(s.first_class()),
        end_class(first_class + s.classes()),
        numbers(static_cast<const S*>(z) + t0 * s.n - first_class * stride) {}

  // v[e] = sum over m of H[block * M + e, m] z[m, column]
  template <int M>
  __device__ __forceinline__ void get(C (&v)[M], int64_t block, int64_t column) const {
    mix(v, block, first_class, end_class,
        [&](int64_t m) { return widen(numbers[m * stride + column]); });
  }
};

}  // namespace cuda
}  // namespace randlora
