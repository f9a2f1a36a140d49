// Rows of B A' for B as lists (delta_lists.cu), in two steps. Once per call, prepare makes the
// compact rows of A', and puts the entries of B in the order in which a row of dW visits them. Then
// one warp makes a row in shared memory: for each rank index j it sums compact rows with signs in
// registers, and adds the sum at positions S_j.
#pragma once
#include "../factored/a_side.h"

namespace randlora::cuda {
namespace {

// ---- prepare ------------------------------------------------------------------------------------

// What prepare_kernel makes and form_kernel (delta_lists.cu) reads.
template <class C>
struct Prepared {
  Support a;
  int64_t columns, chunks;  // columns per chunk; number of chunks
  const int64_t* b_offset;  // of B's rows
  C* value;                 // (r, n, |S_j|)
  uint16_t* position;       // S_j, each counted from the start of its chunk
  uint32_t* entry;          // rows of B, by j: 2 c + (B is -1); so K < 2^31
};

constexpr int kBases = 8;  // rows of value that a block makes

template <class C>
__device__ void make_values(const Prepared<C>& out, const C* __restrict__ lam,
                            const C* __restrict__ gam, int64_t j, int64_t i_begin) {
  const Support& a = out.a;
  const int64_t first = a.offset[2 * j], size = a.size(j), i_end = min(i_begin + kBases, a.n);
  for (int64_t p = threadIdx.x; p < size; p += blockDim.x) {
    const int32_t code = a.entry[a.first(j) + p];
    const int64_t k = code / 2;
    const C sign = code & 1 ? C(-1) : C(1);
    for (int64_t i = i_begin; i < i_end; ++i)
      out.value[first * a.n + i * size + p] = sign * lam[j * a.n + i] * gam[i * a.d + k];
    if (i_begin == 0) out.position[first + p] = static_cast<uint16_t>(k % out.columns);
  }
}

// Where entry x of a line of `lists` goes if blocks of `step` positions follow each other, and in
// each of them the +1 go before the -1: then one walk takes a block, instead of two.
template <class Index>
__device__ __forceinline__ int64_t place_by_blocks(const Lists<Index>& lists, int64_t line,
                                                   int64_t x, int64_t step) {
  const int64_t plus = lists.plus(line), minus = lists.minus(line);
  const int64_t block = static_cast<uint32_t>(lists.index[x]) / static_cast<uint32_t>(step);
  if (x < minus) return x + lower_bound(lists.index, minus, lists.end(line), block * step) - minus;
  return x - minus + lower_bound(lists.index, plus, minus, (block + 1) * step);
}

// Each of the first `value_blocks` blocks takes a rank index and kBases bases; in the others each
// warp takes a row of B.
template <class C, class Index>
__global__ void prepare_kernel(Lists<Index> b_rows, const C* __restrict__ lam,
                               const C* __restrict__ gam, int64_t D, int64_t value_blocks,
                               Prepared<C> out) {
  if (blockIdx.x < value_blocks) {
    const int64_t per_rank = value_blocks / out.a.r;
    return make_values(out, lam, gam, blockIdx.x / per_rank, blockIdx.x % per_rank * kBases);
  }
  const int64_t o = (blockIdx.x - value_blocks) * (blockDim.x / 32) + threadIdx.x / 32;
  if (o >= D) return;
  for (int64_t x = b_rows.plus(o) + threadIdx.x % 32; x < b_rows.end(o); x += 32)
    out.entry[place_by_blocks(b_rows, o, x, out.a.n)] =
        static_cast<uint32_t>(b_rows.index[x]) * 2 + (x >= b_rows.minus(o));
}

template <class C>
Prepared<C> prepare(const DeltaWeight& p, int64_t columns, int64_t chunks, Device& device) {
  const Basis& b = p.basis;
  const Prepared<C> out{support_of(b, device),
                        columns,
                        chunks,
                        b.b_rows.offset,
                        scratch<C>(device, b.a.count * b.n),
                        scratch<uint16_t>(device, b.a.count),
                        scratch<uint32_t>(device, b.b_rows.count)};
  constexpr int kThreads = 64;  // about |S_j| at the densities that use this path
  const int threads = min(kThreads, device.max_threads);
  const int64_t value_blocks = b.r * ceil_div(b.n, kBases);
  const int64_t row_blocks = ceil_div(b.D, threads / 32);
  b.b_rows.typed([&](auto b_rows) {
    launch(device, "delta_weight_prepare", prepare_kernel<C, typename decltype(b_rows)::Index>,
           value_blocks + row_blocks, threads, 0, b_rows, p.lam, p.gam, b.D, value_blocks, out);
  });
  return out;
}

// ---- a row --------------------------------------------------------------------------------------

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
  const uint32_t n = static_cast<uint32_t>(in.a.n);
  const int64_t k0 = q * in.columns, k1 = k0 + in.columns;
  const int64_t end = in.b_offset[2 * o + 2];
  for (int64_t x = in.b_offset[2 * o]; x < end; x += 32) {
    const int entries = static_cast<int>(min(end - x, int64_t{32}));
    const uint32_t packed = lane < entries ? in.entry[x + lane] : 0, c = packed / 2, j = c / n;
    const uint32_t next = __shfl_down_sync(kWarp, j, 1);
    Entry mine = {0, 0, 0};
    if (lane < entries) {
      const int64_t first = in.a.offset[2 * j], before = in.a.before(j, k0);
      mine.value = (first * n + int64_t{c - j * n} * in.a.size(j) + before) * int64_t{sizeof(C)};
      mine.position = static_cast<uint32_t>(first + before) * uint32_t{sizeof(uint16_t)};
      mine.count = in.a.before(j, k1) - static_cast<int>(before);
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
}  // namespace randlora::cuda
