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
// From row q to row q + (1 << bit), for a bit that starts a pass: 0, 3, 6, ...
__device__ __forceinline__ int rows_apart(int bit) { return bit > 0 ? 9 << bit : kColumns; }
RANDLORA_HD int64_t numbers_of(int log) {
  return ((int64_t{1} << log) + (int64_t{1} << log >> 3)) * kColumns;
}

// The columns of a thread: W, adjacent and aligned, if `whole`; else some, `apart`.
template <int W>
struct Some {
  int count;
  bool whole;
  int64_t apart;
  template <class S>
  __device__ __forceinline__ Pack<S, W> load(const S* from) const {
    if (whole) return *reinterpret_cast<const Pack<S, W>*>(from);
    Pack<S, W> pack = {};
#pragma unroll
    for (int u = 0; u < W; ++u)
      if (u < count) pack.set(u, from[u * apart]);
    return pack;
  }
  template <class S>
  __device__ __forceinline__ void store(const Pack<S, W>& pack, S* to) const {
    if (whole) *reinterpret_cast<Pack<S, W>*>(to) = pack;
#pragma unroll
    for (int u = 0; u < W; ++u)
      if (!whole && u < count) to[u * apart] = pack.get(u);
  }
};

// K bits from `bit` on, or fewer if less are left. put(v, q, step) takes rows q + e * step, from
// `numbers`, where the thread's columns begin.
template <int K = 3, class C, class Put>
__device__ __forceinline__ void column_pass(C* numbers, int bit, int log, const Put& put) {
  if constexpr (K > 0)
    if (log - bit < K) return column_pass<K - 1>(numbers, bit, log, put);
  constexpr int W = kPerAccess<C>, kAcross = kColumns / W;
  for (int g = threadIdx.x / kAcross; g < 1 << (log - K); g += blockDim.x / kAcross) {
    const int first = (g >> bit << (bit + K)) | (g & ((1 << bit) - 1));
    C v[W << K];
    const C* from = row_at(numbers, first);
#pragma unroll
    for (int e = 0; e < 1 << K; ++e, from += rows_apart(bit)) load_run<W>(from, v + e * W);
    hadamard<W>(v);
    put(v, first, 1 << bit);
  }
}
template <class C>
__device__ __forceinline__ void column_pass_in_place(C* numbers, int bit, int log) {
  constexpr int W = kPerAccess<C>;
  column_pass(numbers, bit, log, [&](auto& v, int q, int) {
    C* to = row_at(numbers, q);
#pragma unroll
    for (int e = 0; e < int(sizeof(v) / sizeof(C)) / W; ++e, to += rows_apart(bit))
      store_run<W>(v + e * W, to);
  });
}

// Of a block: one for each 8 rows of a thread's columns.
template <class C>
int threads_of(int log, const Device& device) {
  return static_cast<int>(std::clamp<int64_t>((int64_t{kColumns} << log) / (8 * kPerAccess<C>), 32,
                                              std::min(device.max_threads, kThreads)));
}

}  // namespace randlora::cuda
