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

// W adjacent elements to and from numbers.
template <int W, class S, class C>
__device__ __forceinline__ void load_wide(const S* from, C* to) {
  if constexpr (W == 1) {
    *to = widen(*from);
  } else if constexpr (std::is_same_v<S, C>) {
    load_run<W>(from, to);
  } else {
    const auto pack = *reinterpret_cast<const Pack<S, W>*>(from);
#pragma unroll
    for (int u = 0; u < W; ++u) to[u] = widen(pack.get(u));
  }
}
template <int W, class S, class C>
__device__ __forceinline__ void store_wide(const C* from, S* to) {
  if constexpr (W == 1) {
    *to = narrow<S>(*from);
  } else if constexpr (std::is_same_v<S, C>) {
    store_run<W>(from, to);
  } else {
    Pack<S, W> pack = {};
#pragma unroll
    for (int u = 0; u < W; ++u) pack.set(u, narrow<S>(from[u]));
    *reinterpret_cast<Pack<S, W>*>(to) = pack;
  }
}

// The share of a thread: M ranks of W adjacent bases, two where z has 16 bits: there this kernel has
// fewer bytes than instructions, and more numbers than these do not fit the registers.
template <class Z, int M_, bool Whole_>
struct Share {
  static constexpr int M = M_, W = Whole_ && sizeof(Z) == 2 ? 2 : 1;
  static constexpr bool Whole = Whole_;
  int block, t, i;
  // Without a division if Whole.
  __device__ __forceinline__ static int classes(const HadamardSizes& sizes) {
    const int n = static_cast<int>(sizes.n);
    return Whole ? static_cast<int>(sizes.r) : (static_cast<int>(sizes.d) + n - 1) / n;
  }
};

// v[e * W + u] = sum over k < end of H[block * M + e, k] x[k, u]. `walk` has x from rank 0 on.
template <class C, class Of, class Numbers>
__device__ __forceinline__ void mix(C (&v)[Of::M * Of::W], const Of& of, int end, Numbers walk) {
  constexpr int M = Of::M, W = Of::W;
  if (Of::Whole || M <= end) {
#pragma unroll
    for (int e = 0; e < M; ++e) load_wide<W>(walk.next(), v + e * W);
  } else {
#pragma unroll
    for (int e = 0; e < M; ++e) {
      const auto* at = walk.next();
      v[e] = e < end ? widen(*at) : C(0);
    }
  }
#pragma unroll 1
  for (int from = M; from < end; from += M) {
    const bool negative = minus(of.block, from / M);
#pragma unroll
    for (int e = 0; e < M; ++e) {
      const auto* at = walk.next();
      if (!Of::Whole && from + e >= end) continue;
      C x[W];
      load_wide<W>(at, x);
#pragma unroll
      for (int u = 0; u < W; ++u) v[e * W + u] += negative ? -x[u] : x[u];
    }
  }
  hadamard<W>(v);
}

// The ranks of a share, of `end`, to `walk`.
template <class C, class Of, class Numbers>
__device__ __forceinline__ void write_share(const C (&v)[Of::M * Of::W], const Of& of, int end,
                                            Numbers walk) {
  walk.skip(of.block * Of::M);
#pragma unroll
  for (int e = 0; e < Of::M; ++e) {
    auto* at = walk.next();
    if (Of::Whole || of.block * Of::M + e < end) store_wide<Of::W>(v + e * Of::W, at);
  }
}

// Calls fn for each share of the ranks, or classes, of the bases of `tokens` tokens. If `Aligned`, in which
// case z and w are, too, and all shares have M ranks and classes, they are Whole.
template <bool Aligned, class Z, class F>
__device__ __forceinline__ void each_share(const HadamardSizes& sizes, bool of_classes, int tokens,
                                           const F& fn) {
  using C = ComputeOf<Z>;
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r);
  const auto each = [&](auto of) {
    constexpr int M = decltype(of)::M, W = decltype(of)::W;
    const int columns = tokens * n / W;
    const int items = columns * (((of_classes ? of.classes(sizes) : r) + M - 1) / M);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      of.block = items > columns ? item / columns : 0;
      const int q = (item - of.block * columns) * W;
      of.t = tokens > 1 ? q / n : 0;
      of.i = q - of.t * n;
      fn(of);
    }
  };
  const auto with = [&](auto m) {
    constexpr int M = decltype(m)::value;
    if constexpr (Aligned)
      if (r % M == 0 && sizes.d > (r - 1) * n && n % kValues<C> == 0)
        return each(Share<Z, M, true>{});
    each(Share<Z, M, false>{});
  };
  if (kValues<C> == 16 || sizes.r <= 16)
    with(std::integral_constant<int, 16>{});
  else
    with(std::integral_constant<int, kValues<C>>{});
}

// rows[t - t0, j * n + i] = sum over m of H[j, m] z[m, t, i], for `tokens` tokens t from t0 on. In
// z (classes, T, n), bases of successive tokens are adjacent.
template <bool Aligned, class Z, class C = ComputeOf<Z>>
__device__ __forceinline__ void write_mixed(const HadamardSizes& sizes, const void* z, int64_t T,
                                            const Rows<C>& rows, int log, int64_t t0, int tokens) {
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r);
  const Z* numbers = static_cast<const Z*>(z) + t0 * n;
  each_share<Aligned, Z>(sizes, false, tokens, [&](const auto& of) {
    using Of = std::decay_t<decltype(of)>;
    C v[Of::M * Of::W];
    mix(v, of, of.classes(sizes), Walk<const Z, int64_t>{numbers + of.t * n + of.i, T * n});
    write_share(v, of, r, walk_row<Of::Whole>(rows.row(of.t, log), of.i, n));
  });
}

}  // namespace randlora::cuda
