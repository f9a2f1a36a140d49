// A tile of a matrix (rows, columns) in shared memory that a block transforms along its rows:
// kColumns columns of 1 << log rows, neighbouring threads at neighbouring columns.
#pragma once
#include <algorithm>

#include "transform.h"

namespace randlora::cuda {

constexpr int kColumns = 8;  // a thread has kPerAccess of them

// Row q of kColumns numbers in shared memory: 8 numbers left free after every 8 rows keep rows in
// different banks that are 8 apart.
template <class C>
__device__ __forceinline__ C* row_at(C* numbers, int q) {
  return numbers + (q + (q >> 3)) * kColumns;
}
RANDLORA_HD int64_t numbers_of(int log) {
  return ((int64_t{1} << log) + (int64_t{1} << log >> 3)) * kColumns;
}

// Width adjacent elements, aligned, or the first `count`, if not `whole`.
template <int Width>
struct Some {
  int count;
  bool whole;
  template <class S>
  __device__ __forceinline__ Pack<S, Width> load(const S* from) const {
    if (whole) return *reinterpret_cast<const Pack<S, Width>*>(from);
    Pack<S, Width> pack = {};
#pragma unroll
    for (int u = 0; u < Width; ++u)
      if (u < count) pack.set(u, from[u]);
    return pack;
  }
  template <class S>
  __device__ __forceinline__ void store(const Pack<S, Width>& pack, S* to) const {
    if (whole) *reinterpret_cast<Pack<S, Width>*>(to) = pack;
#pragma unroll
    for (int u = 0; u < Width; ++u)
      if (!whole && u < count) to[u] = pack.get(u);
  }
};

// How the columns of W or its gradient are divided.
struct Tiling {
  int log, log_all;  // of the rows of a part, and of all
  int parts, tiles;
  bool aligned;
};

template <class S>
Tiling tiling_of(const HadamardDelta& p, const void* out) {
  Tiling t{};
  t.log = t.log_all = std::max(log_of(p.sizes.N()), 3);
  t.tiles = static_cast<int>(ceil_div(p.sizes.d, kColumns));
  t.aligned = aligned_to_16(p.row_signs) && p.next_row_signs % 4 == 0 &&
              (p.reduce ? aligned_rows(p.sizes.D, kPerAccess<S>, p.weight, out)
                        : aligned_rows(p.sizes.d, kPerAccess<ComputeOf<S>>, p.weight, out));
  return t;
}

// 8 rows of W or its gradient, from o on, and a thread's columns, from k on. Lines lie together in
// memory: columns if Reduce, else rows.
template <class S, bool Reduce>
struct Patch {
  static constexpr int kWidth = kPerAccess<ComputeOf<S>>;
  static constexpr int kLines = Reduce ? kWidth : 8, kAlong = Reduce ? 8 : kWidth;
  Pack<S, kAlong> line[kLines] = {};
  int64_t first;
  int next, lines;
  Some<kAlong> some;

  __device__ __forceinline__ Patch(int D, int d, int o, int k, bool whole)
      : first(Reduce ? int64_t{k} * D + o : int64_t{o} * d + k),
        next(Reduce ? D : d),
        lines(Reduce ? d - k : D - o),
        some{Reduce ? D - o : d - k, whole} {}
  __device__ __forceinline__ void load(const S* from) {
    from += first;
#pragma unroll
    for (int l = 0; l < kLines; ++l, from += next)
      if (some.whole || l < lines) line[l] = some.load(from);
  }
  __device__ __forceinline__ void store(S* to) const {
    to += first;
#pragma unroll
    for (int l = 0; l < kLines; ++l, to += next)
      if (some.whole || l < lines) some.store(line[l], to);
  }
  // Of row o + e and column k + u.
  __device__ __forceinline__ S get(int e, int u) const {
    return Reduce ? line[u].get(e) : line[e].get(u);
  }
  __device__ __forceinline__ void set(int e, int u, S x) {
    Reduce ? line[u].set(e, x) : line[e].set(u, x);
  }
};

// fn(patch, signs of its rows) for the rows of W that are equal in H to rows 8 g to 8 g + 7 of part
// `part`.
template <class S, bool Reduce, class F>
__device__ __forceinline__ void each_patch(const HadamardDelta& p, const Tiling& tiling, int part,
                                           int g, int k, const F& fn) {
  const int D = static_cast<int>(p.sizes.D), d = static_cast<int>(p.sizes.d);
  const auto at = [&](auto whole, int o) {
    constexpr bool Whole = decltype(whole)::value;
    float sign[8];
    if constexpr (Whole) load_run<8>(p.row_signs + o, sign);
#pragma unroll
    for (int e = 0; e < 8 && !Whole; ++e) sign[e] = o + e < D ? p.row_signs[o + e] : 0;
    fn(Patch<S, Reduce>(D, d, o, k, Whole), sign);
  };
#pragma unroll 1
  for (int o = (part << tiling.log) + 8 * g; o < D; o += 1 << tiling.log_all)
    if (tiling.aligned && o + 8 <= D && k + Patch<S, Reduce>::kWidth <= d)
      at(std::true_type{}, o);
    else
      at(std::false_type{}, o);
}

// The transform over all bits but the first three, in passes of three; each ends with a barrier.
// `numbers` is where the thread's columns begin.
template <int Bits = 3, class C>
__device__ __forceinline__ void column_pass(C* numbers, int bit, int log) {
  if constexpr (Bits > 1)
    if (log - bit < Bits) return column_pass<Bits - 1>(numbers, bit, log);
  constexpr int kWidth = kPerAccess<C>, kAcross = kColumns / kWidth;
  const int step = 9 << bit;  // from row q to row q + (1 << bit)
  for (int g = threadIdx.x / kAcross; g < 1 << (log - Bits); g += blockDim.x / kAcross) {
    C* at = row_at(numbers, (g >> bit << (bit + Bits)) | (g & ((1 << bit) - 1)));
    C v[kWidth << Bits];
    const C* from = at;
#pragma unroll
    for (int e = 0; e < 1 << Bits; ++e, from += step) load_run<kWidth>(from, v + e * kWidth);
    hadamard<kWidth>(v);
#pragma unroll
    for (int e = 0; e < 1 << Bits; ++e, at += step) store_run<kWidth>(v + e * kWidth, at);
  }
}
template <class C>
__device__ __forceinline__ void column_passes(C* numbers, int log) {
  for (int bit = 3; bit < log; bit += 3) {
    column_pass(numbers, bit, log);
    __syncthreads();
  }
}

// Of a block: one for each 8 rows of a thread's columns.
template <class C>
int threads_of(int log, const Device& device) {
  return static_cast<int>(std::clamp<int64_t>((int64_t{kColumns} << log) / (8 * kPerAccess<C>), 32,
                                              std::min(device.max_threads, kThreads)));
}

}  // namespace randlora::cuda
