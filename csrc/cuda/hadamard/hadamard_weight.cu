// W + dW in one pass, all experts in one launch: column k of dW is the transform of
//
//   v[c] = col[c] lam[c] H[j, m] s[k] gam[i, k],   c = j * n + i,   m the class of column k
//
// with the signs of `row`, and rows o and o + N of H are equal.
//
// If W is stored by columns k (transposed), a thread block makes a column, or several if they are
// short, as hadamard_up makes a token. Otherwise neighbouring threads have neighbouring columns,
// and a thread block makes kColumns of them, for as many rows of H as fit shared memory: rows
// [part << log, (part + 1) << log). It adds the v of all c that are equal in their last `log` bits,
// with the signs that H has for the bits above, and transforms the sums, in passes of three bits.
//
// Floor: W read and W' written once; the instructions take twice as long, a third of them for v. In
// 16 bits the kColumns of a row are half a sector, so L2, where the neighbouring block's half meets
// it, moves twice the bytes; more columns would leave fewer rows, and each block forms all v of its
// columns.
#include <algorithm>

#include "../device/launch.h"
#include "../kernels.h"
#include "column_tile.h"
#include "mix.h"
#include "write.h"

namespace randlora::cuda {
namespace {

// ---- by columns: like tokens --------------------------------------------------------------------

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_weight_rows_kernel(HadamardWeight all, int log, int64_t of_block) {
  const HadamardWeight p = all.expert(blockIdx.y);
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t k0 = blockIdx.x * of_block, d = p.sizes.d;
  const int columns = static_cast<int>(min(of_block, d - k0));
  const int n = static_cast<int>(p.sizes.n), r = static_cast<int>(p.sizes.r);
  const C* gam = static_cast<const C*>(p.gam);
  for (int item = threadIdx.x; item < columns * n; item += blockDim.x) {
    const int k = item % columns, i = item / columns;
    const int m = static_cast<int>(k0 + k) / n;
    const C g = gam[i * d + k0 + k] * p.s[k0 + k];
    int c = (k << log) + i;
#pragma unroll 8
    for (int j = 0; j < r; ++j, c += n) *rows.at(c) = minus(m, j) ? -g : g;
  }
  __syncthreads();
  transform_and_write<Aligned>(Diagonal<C>(p), RowsOut<S>(p, p.out, p.weight), rows, log, k0,
                               columns);
}

// ---- by rows ------------------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_weight_kernel(HadamardWeight all, int log, int log_all, int tiles, int64_t row_stride,
                           int64_t column_stride, bool aligned) {
  using C = ComputeOf<S>;
  const HadamardWeight p = all.expert(blockIdx.y);
  const RoundedStore<S> store = RowsOut<S>(p, p.out, p.weight).store;
  constexpr int W = kPerAccess<C>, kAcross = kColumns / W;
  const int d = static_cast<int>(p.sizes.d), K = static_cast<int>(p.sizes.K());
  const int n = static_cast<int>(p.sizes.n), part = blockIdx.x / tiles;
  const int from_k = threadIdx.x % kAcross * W, k = blockIdx.x % tiles * kColumns + from_k;
  const bool whole = aligned && k + W <= d;
  const Some<W> some{d - k, whole, column_stride}, of_gamma{d - k, whole, 1};
  C* numbers = reinterpret_cast<C*>(shared_memory()) + from_k;

  {  // v, added
    const C *lam = static_cast<const C*>(p.lam), *gam = static_cast<const C*>(p.gam) + k;
    int m[W];
#pragma unroll
    for (int u = 0; u < W; ++u) m[u] = (k + u) / n;
    // c moves on by 1 << log, q by the threads; j and i follow without a division.
    const int move_q = blockDim.x / kAcross, more_j = (1 << log) / n, more_i = (1 << log) % n;
    const int q0 = threadIdx.x / kAcross, next_j = move_q / n, next_i = move_q % n;
    int j0 = q0 / n, i0 = q0 % n;
    for (int q = q0; q < 1 << log; q += move_q) {
      C sum[W] = {};
      int j = j0, i = i0;
      for (int c = q, above = 0; c < K; c += 1 << log, ++above) {
        const C x = lam[c] * p.col[c];
        const bool turned = minus(above, part);
        const auto g = of_gamma.load(gam + int64_t{i} * d);
#pragma unroll
        for (int u = 0; u < W; ++u)
          sum[u] += minus(m[u], j) != turned ? -(x * g.get(u)) : x * g.get(u);
        j += more_j, i += more_i;
        if (i >= n) i -= n, ++j;
      }
      store_run<W>(sum, row_at(numbers, q));
      j0 += next_j, i0 += next_i;
      if (i0 >= n) i0 -= n, ++j0;
    }
  }
  __syncthreads();
  int bit = 0;
  for (; log - bit > 3; bit += 3) {
    column_pass_in_place(numbers, bit, log);
    __syncthreads();
  }
  column_pass(numbers, bit, log, [&](auto& v, int q, int step) {
    constexpr int M = sizeof(v) / sizeof(C) / W;
    C s[W];
#pragma unroll
    for (int u = 0; u < W; ++u) s[u] = k + u < d ? p.s[k + u] : 0;
#pragma unroll 1
    for (int64_t turn = 0; turn < p.sizes.D; turn += int64_t{1} << log_all) {
      const int64_t first = turn + (int64_t{part} << log) + q;
      const int64_t to = first * row_stride + k * column_stride, move = step * row_stride;
      const float* row = p.row + first;
      const int left = static_cast<int>(min(p.sizes.D - first, int64_t{1} << log_all));
      Pack<S, W> old[M] = {};  // all loads before the first store
      if (store.base)
#pragma unroll
        for (int e = 0; e < M; ++e)
          if (e * step < left) old[e] = some.load(store.base + to + e * move);
#pragma unroll
      for (int e = 0; e < M; ++e, row += step) {
        if (e * step >= left) continue;
#pragma unroll
        for (int u = 0; u < W; ++u)
          old[e].set(u, store.rounded(v[e * W + u] * *row * s[u], old[e].get(u)));
        some.store(old[e], store.out + to + e * move);
      }
    }
  });
}

}  // namespace

// One launch.
void hadamard_weight(const HadamardWeight& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const int64_t d = p.sizes.d;
    const Plan<S> plan(p.sizes, p.experts * d / device.multiprocessors, device);
    if (p.transposed && plan.shared <= device.shared_bytes) {
      launch(device, "hadamard_weight_rows",
             RowsOut<S>(p, p.out, p.weight).aligned ? hadamard_weight_rows_kernel<S, true>
                                                    : hadamard_weight_rows_kernel<S, false>,
             Grid(ceil_div(d, plan.rows), p.experts), plan.threads, plan.shared, p, plan.log,
             plan.rows);
      return;
    }
    const int log_all = log_of(p.sizes.N());
    int log = log_all;
    while (numbers_of(log) * int64_t{sizeof(C)} > std::min(device.shared_bytes, int64_t{72} << 10))
      --log;
    const int tiles = static_cast<int>(ceil_div(d, kColumns));
    const int threads = threads_of<C>(log, device);
    const bool aligned = !p.transposed && aligned_rows(d, kPerAccess<C>, p.gam, p.weight, p.out);
    launch(device, "hadamard_weight", hadamard_weight_kernel<S>,
           Grid(tiles << (log_all - log), p.experts), threads, numbers_of(log) * int64_t{sizeof(C)},
           p, log, log_all, tiles, p.transposed ? 1 : d, p.transposed ? p.sizes.D : 1, aligned);
  });
}

}  // namespace randlora::cuda
