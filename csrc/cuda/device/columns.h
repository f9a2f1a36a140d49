// How threads share the columns of a row-major matrix: Width columns each. If every row is aligned,
// a thread's columns are adjacent, for 16-byte accesses; otherwise a warp's lanes interleave.
// Either way neighbouring lanes touch neighbouring elements.
#pragma once
#include "element.h"
#include "ptx.h"

namespace randlora {

// Elements that move together, kept as words: unpacking 16-bit elements would make a kernel wait
// for a load that it issued ahead. (may_alias lets g++ keep any type in words.)
template <class S, int Count>
struct alignas(sizeof(S) * Count < 16 ? sizeof(S) * Count : 16) [[gnu::may_alias]] Pack {
  static_assert(sizeof(S) * Count % 4 == 0, "whole words");
  uint32_t word[sizeof(S) * Count / 4];

  __device__ __forceinline__ S get(int e) const {
    S x;
    if constexpr (sizeof(S) == 2)
      x.bits = static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16));
    else
      memcpy(&x, word + e * (sizeof(S) / 4), sizeof(S));
    return x;
  }
  __device__ __forceinline__ void set(int e, S x) {
    if constexpr (sizeof(S) == 2) {
      const uint32_t others = e % 2 ? 0x0000ffffu : 0xffff0000u;
      word[e / 2] = (word[e / 2] & others) | static_cast<uint32_t>(x.bits) << (e % 2 * 16);
    } else {
      memcpy(word + e * (sizeof(S) / 4), &x, sizeof(S));
    }
  }
  // 16 bytes at a time, to global memory.
  __device__ __forceinline__ void store(S* to) const {
#pragma unroll
    for (int w = 0; w < int(sizeof(word) / 4); w += 4)
      store16(reinterpret_cast<char*>(to) + 4 * w, word[w], word[w + 1], word[w + 2], word[w + 3]);
  }
};

template <class S>
constexpr int kPerAccess = 16 / int(sizeof(S));

// Width adjacent numbers between registers and memory aligned for accesses of up to 16 bytes.
template <int Width, class C>
__device__ __forceinline__ void load_run(const C* from, C* to) {
  constexpr int kCount = Width < kPerAccess<C> ? Width : kPerAccess<C>;
#pragma unroll
  for (int u = 0; u < Width; u += kCount) {
    const auto pack = *reinterpret_cast<const Pack<C, kCount>*>(from + u);
#pragma unroll
    for (int x = 0; x < kCount; ++x) to[u + x] = pack.get(x);
  }
}
template <int Width, class C>
__device__ __forceinline__ void store_run(const C* from, C* to) {
  constexpr int kCount = Width < kPerAccess<C> ? Width : kPerAccess<C>;
#pragma unroll
  for (int u = 0; u < Width; u += kCount) {
    Pack<C, kCount> pack;
#pragma unroll
    for (int x = 0; x < kCount; ++x) pack.set(x, from[u + x]);
    *reinterpret_cast<Pack<C, kCount>*>(to + u) = pack;
  }
}

template <class... P>
RANDLORA_HD bool aligned_to_16(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}
// Whether all these matrices allow aligned access to `width` elements of rows of `cols` at a time.
template <class... P>
RANDLORA_HD bool aligned_rows(int64_t cols, int width, const P*... matrix) {
  return cols % width == 0 && aligned_to_16(matrix...);
}

// The columns of thread t in a group of whole warps whose columns begin at `from`. Columns past the
// end load as zero and are not stored.
template <int Width, bool Aligned>
struct Columns {
  int first, cols, apart = 32;

  __device__ __forceinline__ Columns(int64_t from, int t, int64_t cols_)
      : first(static_cast<int>(from) + (Aligned ? t * Width : t / 32 * 32 * Width + t % 32)),
        cols(static_cast<int>(cols_)) {}

  __device__ __forceinline__ int at(int v) const { return first + (Aligned ? v : v * apart); }
  __device__ __forceinline__ bool inside(int v) const { return (Aligned ? first : at(v)) < cols; }

  template <class S>
  __device__ __forceinline__ Pack<S, Width> load(const S* row) const {
    Pack<S, Width> p = {};
    if constexpr (Aligned) {
      if (inside(0)) p = *reinterpret_cast<const Pack<S, Width>*>(row + first);
    } else {
#pragma unroll
      for (int v = 0; v < Width; ++v)
        if (inside(v)) p.set(v, row[at(v)]);
    }
    return p;
  }

  template <class S>
  __device__ __forceinline__ void store(S* row, const Pack<S, Width>& p) const {
    if constexpr (Aligned) {
      if (inside(0)) p.store(row + first);
    } else {
#pragma unroll
      for (int v = 0; v < Width; ++v)
        if (inside(v)) row[at(v)] = p.get(v);
    }
  }

  // Bit v is the bit of column at(v) in a row of a bit plane. Width divides 64.
  __device__ __forceinline__ uint32_t bits(const uint64_t* row) const {
    if constexpr (Aligned) {
      return inside(0) ? static_cast<uint32_t>(row[first >> 6] >> (first & 63)) : 0;
    } else {
      uint32_t m = 0;
#pragma unroll
      for (int v = 0; v < Width; ++v)
        if (inside(v)) m |= static_cast<uint32_t>(row[at(v) >> 6] >> (at(v) & 63) & 1) << v;
      return m;
    }
  }
};

// The sum of numbers[q * next] over q < count. Lane l of every warp has the same column, which
// begins at `numbers`, or is null. Warps share the q, and the first one gets the sums. `shared` has
// a number for each thread.
template <class C>
__device__ __forceinline__ C block_sum(const C* numbers, int64_t count, int64_t next, C* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  constexpr int kAtOnce = 8;  // loads that overlap
  C sum = 0;
  for (int64_t first = warp; first < count && numbers; first += kAtOnce * warps) {
    C part[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t q = first + u * warps;
      part[u] = q < count ? numbers[q * next] : C(0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) pin(part[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) sum += part[u];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int other = 1; other < warps && warp == 0; ++other) sum += shared[other * 32 + lane];
  return sum;
}

}  // namespace randlora
