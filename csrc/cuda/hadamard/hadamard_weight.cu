// W + dW in one pass: column k of dW is the transform of
//
//   v[c] = col[c] lam[c] H[j, m] s[k] gam[i, k],   c = j * n + i,   m the class of column k
//
// with the signs of `row`, and rows o and o + N of H are equal.
//
// If W is stored by columns k (transposed), a thread block makes a column, or several if they are
// short, as hadamard_up makes a token. Otherwise neighbouring threads have neighbouring columns,
// and a thread block makes kColumns of them, for as many rows of H as fit shared memory: rows
// [part << log, (part + 1) << log). It adds the v of all c that are equal in their last `log` bits,
// with the signs that H has for the bits above, and transforms the sums.
//
// Floor: W read and W' written once. In 16 bits the kColumns of a row are half a sector, so L2,
// where the neighbouring block's half meets it, moves twice the bytes; more columns would leave
// fewer rows, and each block forms all v of its columns.
#include <algorithm>

#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"
#include "write.h"

namespace randlora::cuda {
namespace {

// The signs of row m of H by j, from a word for 32 of them.
struct SignsOfRow {
  int64_t m;
  uint32_t low = 0;
  __device__ __forceinline__ explicit SignsOfRow(int64_t m_) : m(m_) {
    constexpr uint32_t kHaveBit[] = {0xaaaaaaaau, 0xccccccccu, 0xf0f0f0f0u, 0xff00ff00u,
                                     0xffff0000u};
#pragma unroll
    for (int bit = 0; bit < 5; ++bit)
      if (m >> bit & 1) low ^= kHaveBit[bit];
  }
  // Of j = 32 * block and following, as bits.
  __device__ __forceinline__ uint32_t word(int64_t block) const {
    return minus(m >> 5, block) ? ~low : low;
  }
};

// ---- by columns: like tokens --------------------------------------------------------------------

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_weight_rows_kernel(HadamardWeight p, RowsOut<S> out, Diagonal<C> diagonal, int log,
                                int64_t of_block) {
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t k0 = blockIdx.x * of_block, d = p.sizes.d;
  const int columns = static_cast<int>(min(of_block, d - k0));
  const int n = static_cast<int>(p.sizes.n), r = static_cast<int>(p.sizes.r);
  const C* gam = static_cast<const C*>(p.gam);
  for (int item = threadIdx.x; item < columns * n; item += blockDim.x) {
    const int k = item % columns, i = item / columns;
    const SignsOfRow signs((k0 + k) / n);
    const C g = gam[i * d + k0 + k] * p.s[k0 + k];
    for (int from = 0; from < r; from += 32) {
      const uint32_t word = signs.word(from / 32);
      int c = (k << log) + from * n + i;
#pragma unroll 8
      for (int e = 0; e < 32 && from + e < r; ++e, c += n) *rows.at(c) = word >> e & 1 ? -g : g;
    }
  }
  __syncthreads();
  transform_and_write<Aligned>(diagonal, out, rows, log, k0, columns);
}

// ---- by rows ------------------------------------------------------------------------------------

constexpr int kColumns = 8;

// Row q of kColumns numbers in shared memory. In the first pass a warp has four rows, kValues
// apart, at a time: 8 numbers left free after every kValues rows keep them in different banks.
template <class C>
__device__ __forceinline__ C* row_at(C* numbers, int q) {
  return numbers + (q + q / kValues<C>)*kColumns;
}

// put(v, q, step, k) takes rows q + e * step of column k.
template <int K, class C, class Put>
__device__ __forceinline__ void column_pass(C* numbers, int bit, int log, const Put& put) {
  const int k = threadIdx.x % kColumns;
  for (int g = threadIdx.x / kColumns; g < 1 << (log - K); g += blockDim.x / kColumns) {
    const int first = (g >> bit << (bit + K)) | (g & ((1 << bit) - 1));
    C v[1 << K];
#pragma unroll
    for (int e = 0; e < 1 << K; ++e) v[e] = row_at(numbers, first + (e << bit))[k];
    hadamard<1>(v);
    put(v, first, 1 << bit, k);
  }
}
template <class C, class Put>
__device__ __forceinline__ void column_pass(C* numbers, int bit, int bits, int log,
                                            const Put& put) {
  switch (bits) {
    case 0: return column_pass<0>(numbers, bit, log, put);
    case 1: return column_pass<1>(numbers, bit, log, put);
    case 2: return column_pass<2>(numbers, bit, log, put);
    case 3: return column_pass<3>(numbers, bit, log, put);
    default: return column_pass<4>(numbers, bit, log, put);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    hadamard_weight_kernel(HadamardWeight p, RoundedStore<S> store, int log, int log_all,
                           int64_t tiles, int64_t row_stride, int64_t column_stride) {
  using C = ComputeOf<S>;
  C* numbers = reinterpret_cast<C*>(shared_memory());
  const int64_t d = p.sizes.d, D = p.sizes.D, K = p.sizes.K(), n = p.sizes.n;
  const int64_t k0 = blockIdx.x % tiles * kColumns, part = blockIdx.x / tiles;
  const int columns = static_cast<int>(min(int64_t{kColumns}, d - k0));

  {  // v, added
    const int k = threadIdx.x % kColumns, q0 = threadIdx.x / kColumns;
    const C *lam = static_cast<const C*>(p.lam), *gam = static_cast<const C*>(p.gam) + k0 + k;
    const SignsOfRow signs((k0 + k) / n);
    // c moves on by 1 << log; j and i follow without a division.
    const int64_t more_j = (int64_t{1} << log) / n, more_i = (int64_t{1} << log) % n;
    for (int q = q0; q < 1 << log; q += blockDim.x / kColumns) {
      C sum = C(0);
      int64_t j = q / n, i = q - j * n;
      for (int64_t c = q, above = 0; c < K && k < columns; c += int64_t{1} << log, ++above) {
        const bool negative = (signs.word(j >> 5) >> (j & 31) & 1) != minus(above, part);
        const C x = lam[c] * p.col[c] * gam[i * d];
        sum += negative ? -x : x;
        j += more_j, i += more_i;
        if (i >= n) i -= n, ++j;
      }
      row_at(numbers, q)[k] = sum;
    }
  }
  __syncthreads();
  const int passes = (log + 3) / 4;
  for (int s = 0; s + 1 < passes; ++s) {
    const int bit = log * s / passes;
    column_pass(numbers, bit, log * (s + 1) / passes - bit, log,
                [&](auto& v, int q, int step, int k) {
                  constexpr int M = sizeof(v) / sizeof(C);
#pragma unroll
                  for (int e = 0; e < M; ++e) row_at(numbers, q + e * step)[k] = v[e];
                });
    __syncthreads();
  }
  const int bit = passes ? log * (passes - 1) / passes : 0;
  column_pass(numbers, bit, log - bit, log, [&](auto& v, int q, int step, int k) {
    constexpr int M = sizeof(v) / sizeof(C);
    if (k >= columns) return;
    const C s = p.s[k0 + k];
#pragma unroll 1
    for (int64_t turn = 0; turn < D; turn += int64_t{1} << log_all) {
      const int64_t first = turn + (part << log) + q;
      const int64_t to = first * row_stride + (k0 + k) * column_stride, move = step * row_stride;
      const float* row = p.row + first;
      const int left = static_cast<int>(min(D - first, int64_t{1} << log_all));
      S old[M] = {};  // all loads before the first store
#pragma unroll
      for (int e = 0; e < M; ++e)
        if (store.base && e * step < left) old[e] = store.base[to + e * move];
#pragma unroll
      for (int e = 0; e < M; ++e, row += step)
        if (e * step < left) store.one(to + e * move, v[e] * *row * s, old[e]);
    }
  });
}

}  // namespace

// One launch.
void hadamard_weight(const HadamardWeight& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const RowsOut<S> out(p, p.out, p.base);
    const Plan<S> plan(p.sizes, p.sizes.d / device.multiprocessors, device);
    if (p.transposed && plan.shared <= device.shared_bytes) {
      launch(device, "hadamard_weight_rows",
             out.aligned ? hadamard_weight_rows_kernel<S, true>
                         : hadamard_weight_rows_kernel<S, false>,
             ceil_div(p.sizes.d, plan.rows), plan.threads, plan.shared, p, out, Diagonal<C>(p),
             plan.log, plan.rows);
      return;
    }
    const int log_all = log_of(p.sizes.N());
    const auto bytes = [](int log) {
      return ((int64_t{1} << log) + (int64_t{1} << log) / kValues<C>)*kColumns * int64_t{sizeof(C)};
    };
    int log = log_all;
    while (bytes(log) > std::min(device.shared_bytes, int64_t{72} << 10)) --log;
    const int64_t tiles = ceil_div(p.sizes.d, kColumns);
    const int threads = static_cast<int>(std::clamp<int64_t>(
        (int64_t{kColumns} << log) / kValues<C>, 32, std::min(device.max_threads, kThreads)));
    launch(device, "hadamard_weight", hadamard_weight_kernel<S>, tiles << (log_all - log), threads,
           bytes(log), p, out.store, log, log_all, tiles, p.transposed ? 1 : p.sizes.d,
           p.transposed ? p.sizes.D : 1);
  });
}

}  // namespace randlora::cuda
