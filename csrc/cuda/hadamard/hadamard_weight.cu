// W + dW in one pass, all experts in one launch: column k of dW is the transform of
//
//   v[c] = col_signs[c] lam[c] H[j, m] a_signs[k] gam[i, k]
//
// with c = j * n + i and m the class of column k, times row_signs. Rows o and o + N of H are equal.
//
// A thread block makes kColumns columns, for as many rows of H as fit shared memory: rows
// [part << log, (part + 1) << log). It adds the v of all c that are equal in their last `log` bits,
// with the signs that H has for the bits above, and transforms the sums, in passes of three bits.
//
// Floor: W read and W' written once. If D is N, the instructions, some 57 for an element in two
// parts, take two fifths longer, half of them for v. In 16 bits the kColumns of a row are half a
// sector, so L2, where the neighbouring block's half meets it, moves twice the bytes; more columns
// would leave fewer rows, and each block forms all v of its columns. If W is stored by columns k
// (reduce), D is larger than d: a transform serves several rows, and bytes decide.
#include <algorithm>

#include "../device/launch.h"
#include "../device/rounded_store.h"
#include "../kernels.h"
#include "column_tile.h"
#include "mix.h"

namespace randlora::cuda {
namespace {

template <class S, bool Reduce, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_weight_kernel(HadamardWeight all, Tiling tiling, bool aligned_gam) {
  const HadamardWeight p = all.expert(blockIdx.y);
  constexpr int kWidth = kPerAccess<C>, kAcross = kColumns / kWidth;
  const int d = static_cast<int>(p.sizes.d), K = static_cast<int>(p.sizes.K());
  const int n = static_cast<int>(p.sizes.n), part = blockIdx.x / tiling.tiles, log = tiling.log;
  const int from_k = threadIdx.x % kAcross * kWidth,
            k = blockIdx.x % tiling.tiles * kColumns + from_k;
  C* numbers = reinterpret_cast<C*>(shared_memory()) + from_k;

  const C *lam = static_cast<const C*>(p.lam), *gam = static_cast<const C*>(p.gam) + k;
  int m[kWidth];
#pragma unroll
  for (int u = 0; u < kWidth; ++u) m[u] = (k + u) / n;
  // v, added. c moves on by 1 << log, q by the threads; j and i follow without a division.
  const auto add = [&](auto whole) {
    constexpr bool Whole = decltype(whole)::value;
    const Some<kWidth> some{d - k, Whole};
    const int move_q = blockDim.x / kAcross, more_j = (1 << log) / n, more_i = (1 << log) % n;
    const int q0 = threadIdx.x / kAcross, next_j = move_q / n, next_i = move_q % n;
    int j0 = q0 / n, i0 = q0 % n;
    for (int q = q0; q < 1 << log; q += move_q) {
      C sum[kWidth] = {};
      int j = j0, i = i0;
      for (int c = q, above = 0; c < K; c += 1 << log, ++above) {
        const C sign = minus((above & part) ^ (m[0] & j), ~0) ? C(-1) : C(1);
        const C x = sign * lam[c] * p.col_signs[c];
        const auto g = some.load(gam + int64_t{i} * d);
#pragma unroll
        for (int u = 0; u < kWidth; ++u)
          sum[u] += !Whole && minus(m[u] ^ m[0], j) ? -(x * g.get(u)) : x * g.get(u);
        j += more_j, i += more_i;
        if (i >= n) i -= n, ++j;
      }
      store_run<kWidth>(sum, row_at(numbers, q));
      j0 += next_j, i0 += next_i;
      if (i0 >= n) i0 -= n, ++j0;
    }
  };
  if (aligned_gam && k + kWidth <= d && m[0] == m[kWidth - 1])
    add(std::true_type{});
  else
    add(std::false_type{});
  __syncthreads();
  column_passes(numbers, log);
  const RoundedStore<S> store{static_cast<S*>(p.out), static_cast<const S*>(p.weight),
                              static_cast<C>(p.scale)};
  C a_sign[kWidth];
#pragma unroll
  for (int u = 0; u < kWidth; ++u) a_sign[u] = k + u < d ? p.a_signs[k + u] : 0;
  for (int g = threadIdx.x / kAcross; g < 1 << (log - 3); g += blockDim.x / kAcross) {
    C v[8 * kWidth];
    const C* from = row_at(numbers, 8 * g);
#pragma unroll
    for (int e = 0; e < 8; ++e) load_run<kWidth>(from + e * kColumns, v + e * kWidth);
    hadamard<kWidth>(v);
    each_patch<S, Reduce>(p, tiling, part, g, k, [&](auto patch, const auto& row_sign) {
      if (store.base) patch.load(store.base);
#pragma unroll
      for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int u = 0; u < kWidth; ++u)
          patch.set(e, u,
                    store.rounded(v[e * kWidth + u] * row_sign[e] * a_sign[u], patch.get(e, u)));
      patch.store(store.out);
    });
  }
}

}  // namespace

// One launch.
void hadamard_weight(const HadamardWeight& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    Tiling t = tiling_of<S>(p, p.out);
    const auto shared = [&] { return numbers_of(t.log) * int64_t{sizeof(C)}; };
    while (shared() > std::min(device.shared_bytes, int64_t{72} << 10)) --t.log;
    launch(device, "hadamard_weight",
           p.reduce ? hadamard_weight_kernel<S, true> : hadamard_weight_kernel<S, false>,
           Grid(t.tiles << (t.log_all - t.log), p.experts), threads_of<C>(t.log, device), shared(),
           p, t, aligned_rows(p.sizes.d, kPerAccess<C>, p.gam));
  });
}

}  // namespace randlora::cuda
