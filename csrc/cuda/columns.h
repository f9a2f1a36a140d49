// How threads share the columns of a row-major matrix: V columns each, side by side in 16-byte
// accesses where every row is aligned for that, else one in every so many, so that neighbouring
// threads touch neighbouring elements either way.
#pragma once
#include "element.h"

namespace randlora {

// N elements that move together; the alignment tells the compiler that it may use wide accesses.
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  S v[N];
};

template <class S>
constexpr int kPerAccess = 16 / int(sizeof(S));

// Whether rows of `cols` elements can be taken V at a time from all these matrices.
template <class... P>
bool aligned_rows(int64_t cols, int V, const P*... matrix) {
  return cols % V == 0 && ((reinterpret_cast<uintptr_t>(matrix) % 16 == 0) && ...);
}

template <int V, bool Aligned>
struct Columns {
  int64_t first, cols;
  int step;

  // Of thread t among `threads` who share the V * threads columns from `from` on.
  __device__ __forceinline__ Columns(int64_t from, int t, int threads, int64_t cols_)
      : first(from + (Aligned ? t * V : t)), cols(cols_), step(Aligned ? 1 : threads) {}

  __device__ __forceinline__ int64_t at(int v) const { return first + int64_t{v} * step; }
  __device__ __forceinline__ bool inside(int v) const { return (Aligned ? first : at(v)) < cols; }

  // Columns that lie outside load as zero and are not stored.
  template <class S>
  __device__ __forceinline__ void load(const S* row, typename ComputeOf<S>::type (&x)[V]) const {
    Pack<S, V> p = {};
    if constexpr (Aligned) {
      if (inside(0)) p = *reinterpret_cast<const Pack<S, V>*>(row + first);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (inside(v)) p.v[v] = row[at(v)];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = widen(p.v[v]);
  }

  template <class S>
  __device__ __forceinline__ void store(S* row, const Pack<S, V>& p) const {
    if constexpr (Aligned) {
      if (inside(0)) *reinterpret_cast<Pack<S, V>*>(row + first) = p;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (inside(v)) row[at(v)] = p.v[v];
    }
  }

  // Bit v is the bit of column v in a row of a bit plane. V divides 64.
  __device__ __forceinline__ uint32_t bits(const uint64_t* row) const {
    if constexpr (Aligned) {
      return inside(0) ? static_cast<uint32_t>(row[first >> 6] >> (first & 63)) : 0;
    } else {
      uint32_t m = 0;
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (inside(v)) m |= static_cast<uint32_t>(row[at(v) >> 6] >> (at(v) & 63) & 1) << v;
      return m;
    }
  }
};

}  // namespace randlora
