// What delta_weight prepares once per call for B as lists (delta_lists.cu): the compact rows of A',
// and the entries of A and B in the order in which a row of dW visits them.
#pragma once
#include "../device/launch.h"
#include "../device/list_blocks.h"
#include "delta_weight.h"

namespace randlora {
namespace cuda {
namespace {

// What prepare_kernel makes and form_kernel (delta_lists.cu) reads. a_offset counts from A's first
// non-zero, b_offset from B's.
template <class C>
struct Prepared {
  int64_t r, n, d;
  int64_t columns, chunks;  // columns per chunk; number of chunks
  const int64_t* a_offset;  // of A's lists: S_j is a_offset[2 j] .. a_offset[2 j + 2]
  const int64_t* b_offset;  // of B's rows
  C* value;                 // (r, n, |S_j|)
  uint16_t* position;       // S_j, by chunks, counted from the start of the chunk
  int64_t positions;        // of all S_j
  uint32_t* below;          // (chunks + 1, r): how many of S_j lie in chunks before this one
  uint32_t* entry;          // rows of B, by j: 2 c + (B is -1); so K < 2^31
};

constexpr int kBases = 8;  // rows of value that a block makes

template <class C, class Index>
__device__ void make_values(const ListBlocks<Index>& a, const C* __restrict__ lam,
                            const C* __restrict__ gam, int64_t j, int64_t i_begin,
                            const Prepared<C>& out) {
  const int64_t first = a.lists.plus(j), end = a.lists.end(j), support = end - first;
  const int64_t i_end = min(i_begin + kBases, out.n);
  for (int64_t x = first + threadIdx.x; x < end; x += blockDim.x) {
    const int64_t k = a.lists.index[x], p = a.place(j, x);
    const C sign = x < a.lists.minus(j) ? C(1) : C(-1);
    for (int64_t i = i_begin; i < i_end; ++i)
      out.value[first * out.n + i * support + p] = sign * lam[j * out.n + i] * gam[i * out.d + k];
    if (i_begin == 0) out.position[first + p] = static_cast<uint16_t>(k % out.columns);
  }
  if (i_begin == 0)
    for (int64_t q = threadIdx.x; q <= out.chunks; q += blockDim.x)
      out.below[q * out.r + j] = static_cast<uint32_t>(a.before(j, q));
}

// Each of the first `value_blocks` blocks takes a rank index and kBases bases; in the others each
// warp takes a row of B.
template <class C, class Index>
__global__ void prepare_kernel(Lists<Index> a, Lists<Index> b_rows, const C* __restrict__ lam,
                               const C* __restrict__ gam, int64_t D, int64_t value_blocks,
                               Prepared<C> out) {
  if (blockIdx.x < value_blocks) {
    const int64_t per_rank = value_blocks / out.r;
    return make_values<C, Index>({a, out.columns}, lam, gam, blockIdx.x / per_rank,
                                 blockIdx.x % per_rank * kBases, out);
  }
  const ListBlocks<Index> rows{b_rows, out.n};
  const int64_t o = (blockIdx.x - value_blocks) * (blockDim.x / 32) + threadIdx.x / 32;
  if (o >= D) return;
  for (int64_t x = b_rows.plus(o) + threadIdx.x % 32; x < b_rows.end(o); x += 32)
    out.entry[b_rows.plus(o) + rows.place(o, x)] =
        static_cast<uint32_t>(b_rows.index[x]) * 2 + (x >= b_rows.minus(o));
}

template <class C>
Prepared<C> prepare(const DeltaWeight& p, int64_t columns, int64_t chunks, Device& device) {
  const Basis& b = p.basis;
  const Prepared<C> out{b.r,
                        b.n,
                        b.d,
                        columns,
                        chunks,
                        b.a.offset,
                        b.b_rows.offset,
                        scratch<C>(device, b.a.count * b.n),
                        scratch<uint16_t>(device, b.a.count),
                        b.a.count,
                        scratch<uint32_t>(device, (chunks + 1) * b.r),
                        scratch<uint32_t>(device, b.b_rows.count)};
  constexpr int kThreads = 64;  // about |S_j| at the densities that use this path
  const int threads = device.max_threads < kThreads ? device.max_threads : kThreads;
  const int64_t value_blocks = b.r * ceil_div(b.n, kBases);
  const int64_t row_blocks = ceil_div(b.D, threads / 32);
  const auto with_index = [&](auto index) {
    using Index = decltype(index);
    launch(device, "delta_weight_prepare", prepare_kernel<C, Index>,
           static_cast<unsigned>(value_blocks + row_blocks), threads, 0, b.a.as<Index>(),
           b.b_rows.as<Index>(), static_cast<const C*>(p.lam), static_cast<const C*>(p.gam), b.D,
           value_blocks, out);
  };
  b.wide ? with_index(uint32_t{}) : with_index(uint16_t{});
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace randlora
