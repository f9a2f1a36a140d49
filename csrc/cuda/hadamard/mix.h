// The transform over the rank indices: for one token and one copy i, r numbers become r others.
//
// The ranks are cut into blocks. A thread holds the results of one, and reads all the r numbers,
// block by block: over the bits within a block it transforms them in registers, and over the bits
// above it adds them with the sign that H has for the two blocks. So ranks up to kValues need one
// block, each number is read once, and larger ranks need no memory for anything in between.
#pragma once
#include "transform.h"

namespace randlora::cuda {

__device__ __forceinline__ bool minus(int a, int b) { return __popc(a & b) & 1; }

// Walks: numbers whose ranks follow each other. An address that moves on takes fewer registers than
// one for each number; even and odd ranks have their own.
template <class Element, class Step>
struct Walk {
  Element *at, *other;
  Step step;  // of two ranks
  __device__ __forceinline__ void skip_even(int ranks) {
    at += ranks / 2 * step, other += ranks / 2 * step;
  }
  __device__ __forceinline__ Element* next() {
    Element* here = at;
    at = other, other = here + step;
    return here;
  }
};
template <class C>
struct RowWalk {
  Rows<C> row;
  int c, n;
  __device__ __forceinline__ void skip_even(int ranks) { c += ranks * n; }
  __device__ __forceinline__ C* next() {
    C* here = row.at(c);
    c += n;
    return here;
  }
};

// Width adjacent elements: one, or two of 16 bits in a word.
template <int Width, class S, class C>
__device__ __forceinline__ void load_wide(const S* from, C* to) {
  if constexpr (Width == 1) {
    to[0] = widen(*from);
  } else {
    const auto pack = *reinterpret_cast<const Pack<S, Width>*>(from);
    to[0] = widen(pack.get(0)), to[1] = widen(pack.get(1));
  }
}
template <int Width, class S, class C>
__device__ __forceinline__ void store_wide(const C* from, S* to) {
  if constexpr (Width == 1) {
    *to = narrow<S>(from[0]);
  } else if constexpr (std::is_same_v<S, float>) {  // a row in shared memory
    store8(to, from[0], from[1]);
  } else {
    Pack<S, Width> pack = {};
    pack.set(0, narrow<S>(from[0])), pack.set(1, narrow<S>(from[1]));
    *reinterpret_cast<Pack<S, Width>*>(to) = pack;
  }
}

// to[k] = sum over l < end of H[k, l] from[l] for the ranks k < to_end of a block, which has
// PerBlock of them, and for Width adjacent copies. Whole: PerBlock divides both ends.
template <bool Whole, int PerBlock, int Width, class C, class From, class To>
__device__ __forceinline__ void mix_block(int block, From from, int end, To to, int to_end) {
  C v[PerBlock * Width];
#pragma unroll
  for (int e = 0; e < PerBlock; ++e) {
    const auto* at = from.next();
    if (Whole || e < end)
      load_wide<Width>(at, v + e * Width);
    else
      v[e * Width] = C(0);
  }
#pragma unroll 1
  for (int first = PerBlock; first < end; first += PerBlock) {
    const bool negative = minus(block, first / PerBlock);
#pragma unroll
    for (int e = 0; e < PerBlock; ++e) {
      const auto* at = from.next();
      if (!Whole && first + e >= end) continue;
      C x[Width];
      load_wide<Width>(at, x);
#pragma unroll
      for (int u = 0; u < Width; ++u) v[e * Width + u] += negative ? -x[u] : x[u];
    }
  }
  hadamard<Width>(v);
  to.skip_even(block * PerBlock);
#pragma unroll
  for (int e = 0; e < PerBlock; ++e) {
    auto* at = to.next();
    if (Whole || block * PerBlock + e < to_end) store_wide<Width>(v + e * Width, at);
  }
}

// For `tokens` tokens t from t0 on
//
//   rows[t - t0, j * n + i] = sum over m of H[j, m] z[m, t, i]    if Z is const
//   z[m, t, i] = sum over j of H[j, m] rows[t - t0, j * n + i]    otherwise
//
// In z (classes, T, n), copies of successive tokens are adjacent. `Aligned` says that z is. Whole
// blocks of ranks and classes need no checks, and the gaps in a row repeat every second rank if n
// is a multiple of kValues / 2. There a thread takes two copies in 16 bits: it is bound by
// instructions, not by bytes.
template <bool Aligned, class Z, class C = ComputeOf<std::remove_const_t<Z>>>
__device__ __forceinline__ void mix(const HadamardSizes& sizes, Z* z, int64_t T,
                                    const Rows<C>& rows, int log, int64_t t0, int tokens) {
  const int n = static_cast<int>(sizes.n), r = static_cast<int>(sizes.r);
  const int d = static_cast<int>(sizes.d);
  const auto with = [&](auto m, auto whole) {
    constexpr bool Whole = decltype(whole)::value, kUp = std::is_const_v<Z>;
    constexpr int kPerBlock = decltype(m)::value, kWidth = Whole && sizeof(Z) == 2 ? 2 : 1;
    const int classes = Whole ? r : (d + n - 1) / n, columns = tokens * n / kWidth;
    const int items = columns * (((kUp ? r : classes) + kPerBlock - 1) / kPerBlock);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int block = items > columns ? item / columns : 0, q = (item - block * columns) * kWidth;
      const int t = tokens > 1 ? q / n : 0, i = q - t * n;
      Z* from = z + t0 * n + q;
      const Walk<Z, int64_t> at_z{from, from + T * n, 2 * T * n};
      const auto at_row = [&] {
        const auto row = rows.row(t, log);
        if constexpr (Whole)
          return Walk<C, int>{row.at(i), row.at(i + n), 2 * n + 2 * n / kValues<C> * row.kFree};
        else
          return RowWalk<C>{row, i, n};
      }();
      if constexpr (kUp)
        mix_block<Whole, kPerBlock, kWidth, C>(block, at_z, classes, at_row, r);
      else
        mix_block<Whole, kPerBlock, kWidth, C>(block, at_row, r, at_z, classes);
    }
  };
  const auto with_ranks = [&](auto m) {
    if (Aligned && r % decltype(m)::value == 0 && d > (r - 1) * n && n % (kValues<C> / 2) == 0)
      with(m, std::bool_constant<Aligned>{});
    else
      with(m, std::false_type{});
  };
  if (kValues<C> == 16 || r <= 16)
    with_ranks(std::integral_constant<int, 16>{});
  else
    with_ranks(std::integral_constant<int, kValues<C>>{});
}

}  // namespace randlora::cuda
