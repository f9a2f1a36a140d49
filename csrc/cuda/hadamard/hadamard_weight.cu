// W + dW in one pass: column k of dW is the transform of
//
//   v[c] = col[c] lam[c] H[j, m] s[k] gam[i, k],   c = j * n + i,   m the class of column k
//
// with the signs of `row`, and rows o and o + N of H are equal.
//
// If W is stored by columns k (transposed), a thread block makes a column, or several if they are
// short, as hadamard_up makes a token. Otherwise neighbouring threads have neighbouring columns,
// and a thread block makes kColumns of them, for as many rows of H as fit shared memory: rows
// [part * O, part * O + O). It adds the v of all c that are equal modulo O, with the signs of H for
// the bits above, and transforms O numbers.
//
// Floor: W read and W' written once.
#include <algorithm>

#include "../delta/delta_store.h"
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora {
namespace cuda {
namespace {

// ---- by columns: like tokens --------------------------------------------------------------------

template <class S, bool Aligned>
__global__ void hadamard_weight_rows_kernel(HadamardWeight p, DeltaStore<S> store, int log,
                                            int64_t of_block) {
  using C = typename ComputeOf<S>::type;
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const Rows<C, false> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t k0 = blockIdx.x * of_block, d = p.sizes.d, D = p.sizes.D, N = int64_t{1} << log;
  const int columns = static_cast<int>(min(of_block, d - k0));
  const int n = static_cast<int>(p.sizes.n), K = static_cast<int>(p.sizes.K());
  const C *lam = static_cast<const C*>(p.lam), *gam = static_cast<const C*>(p.gam);

  for (int item = threadIdx.x; item < columns * n; item += blockDim.x) {
    const int k = item % columns, i = item / columns;
    const int64_t m = (p.sizes.first_column + k0 + k) / n;
    const C g = with_sign(gam[i * d + k0 + k], p.s[k0 + k]);
#pragma unroll 4
    for (int c = i, j = 0; c < K; c += n, ++j) {
      const C x = with_sign(lam[c] * g, p.col[c]);
      *rows.at((k << log) + c) = minus(j, m) ? -x : x;
    }
  }
  const int rest = (1 << log) - K;
  for (int item = threadIdx.x; item < columns * rest; item += blockDim.x)
    *rows.at((item / rest << log) + K + item % rest) = C(0);

  transform_in_block(rows, log, kEdgeBits<S>, of_block << log);

  for (int g = threadIdx.x; g < columns << log >> kBits<C>; g += blockDim.x) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<V>(v);
    const int64_t begin = (k0 + at.row) * D;
#pragma unroll
    for (int e = 0; e < At::kCount; ++e) {
      if constexpr (Aligned) {
        for (int64_t o = (at.first + at.place(e) - p.sizes.first_row) & (N - 1); o < D; o += N) {
          const auto sign = *reinterpret_cast<const Piece<int8_t, V>*>(p.row + o);
          C x[V];
#pragma unroll
          for (int u = 0; u < V; ++u) x[u] = with_sign(v[e * V + u], sign.v[u]);
          store.template run<V>(begin + o, x);
        }
      } else {
#pragma unroll
        for (int u = 0; u < V; ++u)
          for (int64_t o = (at.column(u) + at.place(e) - p.sizes.first_row) & (N - 1); o < D;
               o += N)
            store.one(begin + o, with_sign(v[e * V + u], p.row[o]));
      }
    }
  }
}

// ---- by rows ------------------------------------------------------------------------------------

constexpr int kColumns = 16;

// Shared memory: row q of kColumns numbers is `at(q)`. The rows of a warp's halves in the first
// pass, kValues apart, are in different banks.
template <class C>
__device__ __forceinline__ C* row_of(C* numbers, int q) {
  return numbers + (q + q / kValues<C>)*kColumns;
}

template <int K, class C>
__device__ __forceinline__ void column_pass(C* numbers, int bit, int log) {
  for (int item = threadIdx.x; item < kColumns << (log - K); item += blockDim.x) {
    const int k = item % kColumns, g = item / kColumns;
    const int first = (g >> bit << (bit + K)) | (g & ((1 << bit) - 1));
    C v[1 << K];
#pragma unroll
    for (int e = 0; e < 1 << K; ++e) v[e] = row_of(numbers, first + (e << bit))[k];
    hadamard<1>(v);
#pragma unroll
    for (int e = 0; e < 1 << K; ++e) row_of(numbers, first + (e << bit))[k] = v[e];
  }
}

template <class S>
__global__ void hadamard_weight_kernel(HadamardWeight p, DeltaStore<S> store, int log, int log_all,
                                       int64_t tiles, int64_t row_stride, int64_t column_stride) {
  using C = typename ComputeOf<S>::type;
  C* numbers = reinterpret_cast<C*>(shared_memory());
  const int64_t d = p.sizes.d, D = p.sizes.D, n = p.sizes.n, K = p.sizes.K();
  const int64_t k0 = blockIdx.x % tiles * kColumns, part = blockIdx.x / tiles;
  const int columns = static_cast<int>(min(int64_t{kColumns}, d - k0)), count = kColumns << log;
  const C *lam = static_cast<const C*>(p.lam), *gam = static_cast<const C*>(p.gam);

  for (int item = threadIdx.x; item < count; item += blockDim.x) {
    const int k = item % kColumns, q = item / kColumns;
    C sum = C(0);
    if (k < columns) {
      const int64_t m = (p.sizes.first_column + k0 + k) / n;
      for (int64_t c = q, above = 0; c < K; c += int64_t{1} << log, ++above) {
        const int64_t j = c / n, i = c - j * n;
        const C x = with_sign(lam[c], p.col[c]) * gam[i * d + k0 + k];
        sum += minus(j, m) != minus(above, part) ? -x : x;
      }
    }
    row_of(numbers, q)[k] = sum;
  }
  __syncthreads();
  for (int bit = 0; bit < log; bit += kBits<C>) {
    switch (min(kBits<C>, log - bit)) {
      case 1: column_pass<1>(numbers, bit, log); break;
      case 2: column_pass<2>(numbers, bit, log); break;
      case 3: column_pass<3>(numbers, bit, log); break;
      case 4: column_pass<4>(numbers, bit, log); break;
      default: column_pass<kBits<C>>(numbers, bit, log);
    }
    __syncthreads();
  }
  for (int item = threadIdx.x; item < count; item += blockDim.x) {
    const int k = item % kColumns, q = item / kColumns;
    if (k >= columns) continue;
    const C x = with_sign(row_of(numbers, q)[k], p.s[k0 + k]);
    for (int64_t o = ((part << log) + q - p.sizes.first_row) & ((int64_t{1} << log_all) - 1); o < D;
         o += int64_t{1} << log_all)
      store.one(o * row_stride + (k0 + k) * column_stride, with_sign(x, p.row[o]));
  }
}

template <class S>
void weight(const HadamardWeight& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  constexpr int V = kPerAccess<S>;
  const DeltaStore<S> store(p);
  const Plan<S> plan(p.sizes, p.sizes.d, device);
  if (p.transposed && plan.fits(device)) {
    const bool aligned = store.aligned(V) && p.sizes.D % V == 0 && p.sizes.first_row % V == 0 &&
                         reinterpret_cast<uintptr_t>(p.row) % V == 0;
    launch(device, "hadamard_weight_rows",
           aligned ? hadamard_weight_rows_kernel<S, true> : hadamard_weight_rows_kernel<S, false>,
           static_cast<unsigned>(ceil_div(p.sizes.d, plan.rows)), plan.threads, plan.shared, p,
           store, plan.log, plan.rows);
    return;
  }
  const int log_all = log_of(p.sizes.N());
  const auto bytes = [](int log) {
    return ((int64_t{1} << log) + (int64_t{1} << log) / kValues<C>)*kColumns * int64_t{sizeof(C)};
  };
  int log = log_all;
  while (bytes(log) > std::min(device.shared_bytes, int64_t{72} << 10)) --log;
  const int64_t tiles = ceil_div(p.sizes.d, kColumns);
  const int threads = static_cast<int>(std::clamp<int64_t>((int64_t{kColumns} << log) / kValues<C>,
                                                           32, std::min(device.max_threads, 256)));
  launch(device, "hadamard_weight", hadamard_weight_kernel<S>,
         static_cast<unsigned>(tiles << (log_all - log)), threads, bytes(log), p, store, log,
         log_all, tiles, p.transposed ? 1 : p.sizes.d, p.transposed ? p.sizes.D : 1);
}

}  // namespace

// One launch.
void hadamard_weight(const HadamardWeight& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) { weight<decltype(s)>(p, device); });
}

}  // namespace cuda
}  // namespace randlora
