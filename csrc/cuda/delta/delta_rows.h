// One warp makes a row of B A' in shared memory from what delta_prepare.h made (delta_lists.cu).
// For each rank index j it sums compact rows with signs in registers, then adds the sum at
// positions S_j.
#pragma once
#include "delta_prepare.h"

namespace randlora {
namespace cuda {
namespace {

constexpr int kSteps = 3;  // of 32 positions each, which a warp sums in registers
constexpr int kAhead = 4;  // entries whose values are loaded before the first is added

// An unpacked entry of B: where its compact row is and where the row is added.
struct Entry {
  int64_t value;      // byte offset of its row in `value`, in this chunk of columns
  uint32_t position;  // byte offset of its first position
  int count;          // of positions

  // Packed for shared memory: one access.
  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32), position,
                      static_cast<uint32_t>(count));
  }
  static __device__ __forceinline__ Entry of(uint4 w) {
    return {static_cast<int64_t>(static_cast<uint64_t>(w.y) << 32 | w.x), w.z,
            static_cast<int>(w.w)};
  }
};

// 32 entries of a row of B: bit e belongs to entry e.
struct Batch {
  uint4* entry;
  uint32_t minus, last;  // entry e is subtracted; it is the last of its j
};

// Entries whose values are being loaded.
template <class C>
struct Ahead {
  Entry entry[kAhead];
  C v[kAhead][kSteps];

  // `value` points to this lane's element, at position `from`.
  __device__ __forceinline__ void load(const uint4* batch, int from, const C* value) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      entry[u] = Entry::of(batch[u]);
      const C* mine =
          reinterpret_cast<const C*>(reinterpret_cast<const char*>(value) + entry[u].value);
#pragma unroll
      for (int t = 0; t < kSteps; ++t)
        v[u][t] = from + 32 * t < entry[u].count ? mine[32 * t] : C(0);
    }
  }
};

// Sums of one rank index at this lane's positions, and where they go.
template <class C>
struct Sums {
  const uint16_t* position;  // this lane's element, at `from`
  C* row;
  int from, nowhere;  // this lane's first position; an element of the row that nobody reads
  C sum[kSteps];

  __device__ __forceinline__ void add(const Ahead<C>& a, uint32_t minus, uint32_t last) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const C sign = minus >> u & 1 ? C(-1) : C(1);
#pragma unroll
      for (int t = 0; t < kSteps; ++t) sum[t] += sign * a.v[u][t];
      if (last >> u & 1) flush(a.entry[u]);
    }
  }

  // Positions of one rank index differ, so all can be loaded before one is stored.
  __device__ __forceinline__ void flush(const Entry& e) {
    const auto* to =
        reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(position) + e.position);
    const int left = e.count - from;
    int at[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) at[t] = 32 * t < left ? to[32 * t] : nowhere;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) sum[t] += row[at[t]];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      row[at[t]] = sum[t];
      sum[t] = C(0);
    }
    __syncwarp();
  }
};

// Adds positions p .. p + 32 * kSteps of a batch's compact rows to the row.
template <class C>
__device__ __forceinline__ void add_batch(Batch b, int entries, int p, const C* value,
                                          const uint16_t* position, C* row, int nowhere) {
  const int from = p + threadIdx.x % 32;
  Sums<C> sums{position + from, row, from, nowhere, {}};
  Ahead<C> first, second;
  first.load(b.entry, from, value + from);
  for (int e = 0; e < entries; e += 2 * kAhead) {
    second.load(b.entry + e + kAhead, from, value + from);
    sums.add(first, b.minus, b.last);
    if (e + 2 * kAhead < entries) first.load(b.entry + e + 2 * kAhead, from, value + from);
    sums.add(second, b.minus >> kAhead, b.last >> kAhead);
    b.minus >>= 2 * kAhead;
    b.last >>= 2 * kAhead;
  }
}

// The sums of row o in chunk q of columns, added to `row`.
template <class C>
__device__ __forceinline__ void add_row(const Prepared<C>& in, int64_t o, int64_t q,
                                        const uint16_t* position, uint4* batch, C* row,
                                        int nowhere) {
  const int lane = threadIdx.x % 32;
  const uint32_t n = static_cast<uint32_t>(in.n);
  const uint32_t *below = in.below + q * in.r, *upto = below + in.r;
  const int64_t end = in.b_offset[2 * o + 2];
  for (int64_t x = in.b_offset[2 * o]; x < end; x += 32) {
    const int entries = static_cast<int>(min(end - x, int64_t{32}));
    const uint32_t packed = lane < entries ? in.entry[x + lane] : 0, c = packed / 2, j = c / n;
    const uint32_t next = __shfl_down_sync(kWarp, j, 1);
    Entry mine = {0, 0, 0};
    if (lane < entries) {
      const int64_t first = in.a_offset[2 * j], support = in.a_offset[2 * j + 2] - first;
      mine.value = (first * in.n + int64_t{c - j * n} * support + below[j]) * int64_t{sizeof(C)};
      mine.position = (static_cast<uint32_t>(first) + below[j]) * uint32_t{sizeof(uint16_t)};
      mine.count = static_cast<int>(upto[j] - below[j]);
    }
    const bool last = next != j ? lane < entries : lane == entries - 1;
    const Batch b{batch, __ballot_sync(kWarp, packed % 2), __ballot_sync(kWarp, last)};
    batch[lane] = mine.packed();  // the previous batch was read before `flush`'s barrier
    __syncwarp();
    for (int p = 0; __any_sync(kWarp, p < mine.count); p += 32 * kSteps)
      add_batch(b, entries, p, in.value, position, row, nowhere);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace randlora
