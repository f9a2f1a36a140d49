// dW = scale * B @ A' (D, d) or its transpose, plus a base, from lists: density^2 of a GEMM's work.
//
// The n rows of A' of one rank index j share the support S_j, so we store them compactly:
//   value[j][i][p] = A[j, k] lam[j, i] gam[i, k],  k = S_j[p]
// For each j, row o of dW gets the signed sum of the rows i with B[o, (j, i)] != 0, added once at
// the positions S_j.
//
//   prepare   (delta_rows.h) makes value and regroups the lists so that one walk makes a row of
//             dW: a row of B by j, a row of A by chunks of columns
//   form      a warp makes a chunk of a row of dW (4096 columns in fp32) in shared
//             memory. Each lane unpacks one of 32 entries of B. Then lanes are positions of S_j:
//             up to 96 sums stay in registers over the entries of one j and are added to the row
//             when j ends. Positions of one j differ, so plain additions and a warp barrier after
//             each j suffice. The values of eight entries are loaded ahead.
//             If transposed, a block makes 16 rows at once, so it stores whole sectors of dW^T.
//
// Floor: dW is written once (34 MB at 4096 x 4096 in 16 bits); density^2 D K d additions (17
// million at density 1/64). Sums in registers save shared-memory updates: one per j, not per entry.
//
// Zeros of A and B are skipped: an infinite gamma reaches only the elements that depend on it.
#include <algorithm>

#include "../device/rounded_store.h"
#include "delta_rows.h"

namespace randlora::cuda {
namespace {

constexpr int kTransposedRows = 16;  // a 32-byte sector of 16-bit elements

// The rows of dW that a block makes.
struct Tile {
  int rows, stride;  // a warp per row; kTransposedRows if transposed
  bool aligned;      // out and base allow runs of 16 bytes
  bool positions;    // whether A's positions fit in shared memory, too
};

// In runs of 16 bytes of sums, so that the lanes' loads from shared memory do not conflict.
template <class S, class C>
__device__ void store_row(const C* row, int64_t first, int count, const Tile& t,
                          const RoundedStore<S>& store) {
  constexpr int N = kPerAccess<C>;
  const int lane = threadIdx.x % 32;
  if (!t.aligned) {
    for (int k = lane; k < count; k += 32) store.one(first + k, row[k]);
    return;
  }
  for (int k = lane * N; k < count; k += 32 * N) {
    C sum[N];
    load_run<N>(row + k, sum);
    store.template run<N>(first + k, sum);
  }
}

// out[k][o] for the tile's rows o, in runs of 16 bytes of dW. Neighbouring threads take
// neighbouring o, then the next k.
template <class S, class C>
__device__ void store_columns(const C* tile, int64_t k0, int columns, int64_t o0, int rows,
                              int64_t D, const Tile& t, const RoundedStore<S>& store) {
  constexpr int N = kPerAccess<S>, kRuns = kTransposedRows / N;
  if (!t.aligned) {
    for (int e = threadIdx.x; e < columns * kTransposedRows; e += blockDim.x) {
      const int k = e / kTransposedRows, q = e % kTransposedRows;
      if (q < rows) store.one((k0 + k) * D + o0 + q, tile[q * t.stride + k]);
    }
    return;
  }
  for (int e = threadIdx.x; e < columns * kRuns; e += blockDim.x) {
    const int k = e / kRuns, q = e % kRuns * N;
    if (q >= rows) continue;
    C sum[N];
#pragma unroll
    for (int v = 0; v < N; ++v) sum[v] = tile[(q + v) * t.stride + k];
    store.template run<N>((k0 + k) * D + o0 + q, sum);
  }
}

template <class S, bool Transposed>
__global__ void __launch_bounds__(256, 2)
    form_kernel(Prepared<ComputeOf<S>> in, int64_t D, Tile t, RoundedStore<S> store) {
  using C = ComputeOf<S>;
  C* tile = reinterpret_cast<C*>(shared_memory());                      // (t.rows, t.stride)
  uint4* batches = reinterpret_cast<uint4*>(tile + t.rows * t.stride);  // 32 entries a warp
  uint16_t* staged = reinterpret_cast<uint16_t*>(batches + blockDim.x);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t o0 = blockIdx.x / in.chunks * t.rows, q = blockIdx.x % in.chunks;
  const int rows = static_cast<int>(min(D - o0, int64_t{t.rows}));
  const int64_t k0 = q * in.columns;
  const int columns = static_cast<int>(min(in.a.d - k0, in.columns));

  constexpr int kRun = kPerAccess<C>;
  for (int e = threadIdx.x * kRun; e < t.rows * t.stride; e += blockDim.x * kRun)
    *reinterpret_cast<uint4*>(tile + e) = make_uint4(0, 0, 0, 0);
  if (t.positions)
    for (int64_t e = threadIdx.x; e < in.a.count; e += blockDim.x) staged[e] = in.position[e];
  __syncthreads();
  C* row = tile + warp * t.stride;
  for (int w = warp; w < rows; w += warps, row += warps * t.stride)
    add_row(in, o0 + w, q, t.positions ? staged : in.position, batches + warp * 32, row,
            static_cast<int>(in.columns) + threadIdx.x % 32);
  if constexpr (Transposed) {
    __syncthreads();
    store_columns(tile, k0, columns, o0, rows, D, t, store);
  } else {
    if (warp < rows)
      store_row(tile + warp * t.stride, (o0 + warp) * in.a.d + k0, columns, t, store);
  }
}

// ---- host ---------------------------------------------------------------------------------------

// A block's share of an SM's 227 KB: three blocks of 4 warps with a row of 16 KB per warp, or two
// blocks of 8 warps with 16 rows each.
constexpr int kRowWarps = 4;
constexpr int64_t kRowBytes = 16 << 10, kTransposedBytes = 104 << 10, kPositionBytes = 6 << 10;

}  // namespace

void delta_weight_lists(const DeltaWeight& p, Device& device) {
  const Basis& b = p.basis;
  const int threads = std::min(device.max_threads, p.transposed ? 256 : 32 * kRowWarps);
  const int64_t batches = threads * int64_t{sizeof(uint4)};
  // 32 elements after each row are written but never read. Transposed, a stride of 2 modulo 32 puts
  // the runs of a column in different banks.
  const int64_t rows = p.transposed ? kTransposedRows : threads / 32, pad = p.transposed ? 34 : 32;
  const int64_t room = std::min(device.shared_bytes - batches,
                                p.transposed ? kTransposedBytes : rows * (kRowBytes + 128));
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const int64_t most = (room / (rows * int64_t{sizeof(C)}) - pad) / 32 * 32;
    const int64_t chunks = ceil_div(b.d, std::max<int64_t>(most, 32));
    const int64_t columns = ceil_div(ceil_div(b.d, chunks), 32) * 32;
    const auto store = RoundedStore<S>::of(p, p.scale);
    const int run = p.transposed ? kPerAccess<S> : kPerAccess<C>;
    Tile t{static_cast<int>(rows), static_cast<int>(columns + pad),
           store.aligned(run) && (p.transposed ? b.D : b.d) % run == 0, false};
    int64_t shared = t.rows * t.stride * int64_t{sizeof(C)} + batches;
    const int64_t position_bytes = b.a.count * int64_t{sizeof(uint16_t)};
    t.positions = position_bytes <= std::min(kPositionBytes, device.shared_bytes - shared);
    if (t.positions) shared += position_bytes;

    const Prepared<C> in = prepare<C>(p, columns, chunks, device);
    launch(device, "delta_weight_form", p.transposed ? form_kernel<S, true> : form_kernel<S, false>,
           ceil_div(b.D, rows) * chunks, threads, shared, in, b.D, t, store);
  });
}

}  // namespace randlora::cuda
