// The gradients of lambda and gamma from G, that of W + dW. For column k, with m its class and
//
//   u[c] = sum over o of row_signs[o] H[o, c] G[o, k],   c = j * n + i,
//   dgam[i, k] = scale a_signs[k] sum over j of H[j, m] col_signs[c] lam[c] u[c]
//   dlam[c] = scale col_signs[c] sum over k of H[j, m] a_signs[k] gam[i, k] u[c]
//
// A block takes the tiles of a slot, kColumns columns each, and keeps the slot's sums for dlam in
// shared memory, where always the same thread adds to a number; add_slots adds the slots. Elements of rows o and o + N of G, whose rows of H are equal, are added as they are
// read. If rows do not fit, parts of 1 << log follow each other: each gives its transform to every
// u[c], with the sign that H has for the bits above.
//
// Floor: G read once, 15 us for 4096 x 4096 in bf16; the instructions, 42 for an element and 9 more
// for each part after the first, and shared memory take twice as long.
#include "../device/launch.h"
#include "../kernels.h"
#include "column_tile.h"
#include "mix.h"

namespace randlora::cuda {
namespace {

// How a warp's lanes share the ranks of a copy.
struct Ranks {
  int split, of_lane;  // 1 << split lanes, so many ranks each
  bool aligned;        // gam and dgam
};

// Part `part` of the thread's columns, from k on, after the first three bits of the transform.
template <bool Reduce, class S, class C = ComputeOf<S>>
__device__ __forceinline__ void read_part(const HadamardWeightBackward& p, const Tiling& tiling,
                                          int part, int k, C* numbers) {
  constexpr int kWidth = kPerAccess<C>, kAcross = kColumns / kWidth;
  for (int g = threadIdx.x / kAcross; g < 1 << (tiling.log - 3); g += blockDim.x / kAcross) {
    C v[8 * kWidth] = {};
    each_patch<S, Reduce>(p, tiling, part, g, k, [&](auto patch, const auto& row_sign) {
      patch.load(static_cast<const S*>(p.weight));
#pragma unroll
      for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int u = 0; u < kWidth; ++u) v[e * kWidth + u] += widen(patch.get(e, u)) * row_sign[e];
    });
    hadamard<kWidth>(v);
    C* to = row_at(numbers, 8 * g);
#pragma unroll
    for (int e = 0; e < 8; ++e) store_run<kWidth>(v + e * kWidth, to + e * kColumns);
  }
}

// dgam of the thread's columns, and their part of the slot's sums. A warp takes a few copies; its
// lanes share columns and, if copies are few, ranks. `Whole`: the thread's columns have one class,
// and lanes whole numbers of ranks. x[c] is
// lam[c] col_signs[c].
template <bool Whole, class C>
__device__ __forceinline__ void mix_part(const HadamardWeightBackward& p, int log,
                                         const Ranks& ranks, int part, int k, const C* numbers,
                                         const C* x, C* sums) {
  constexpr int kWidth = kPerAccess<C>, kAcross = kColumns / kWidth;
  const int n = static_cast<int>(p.sizes.n), r = static_cast<int>(p.sizes.r);
  const int d = static_cast<int>(p.sizes.d), lane = threadIdx.x % 32 / kAcross;
  const int of_warp = 32 / kAcross >> ranks.split, share = lane / of_warp;
  const int first = share * ranks.of_lane, last = first + ranks.of_lane;
  C* dgam = static_cast<C*>(p.dgam);
  const Some<kWidth> some{d - k, ranks.aligned && k + kWidth <= d};
  int m[kWidth];
  C a_sign[kWidth];
#pragma unroll
  for (int u = 0; u < kWidth; ++u) m[u] = (k + u) / n, a_sign[u] = k + u < d ? p.a_signs[k + u] : 0;
  for (int i0 = threadIdx.x / 32 * of_warp; i0 < n; i0 += blockDim.x / 32 * of_warp) {
    const bool inside = i0 + lane % of_warp < n;
    const int i = inside ? i0 + lane % of_warp : 0;  // others work for nothing
    const int64_t at = int64_t{i} * d + k;
    const Pack<C, kWidth> gam = some.load(static_cast<const C*>(p.gam) + at);
    C g[kWidth], of_gam[kWidth] = {};
#pragma unroll
    for (int u = 0; u < kWidth; ++u) g[u] = gam.get(u) * a_sign[u];
    for (int j = first; j < last; j += kAcross) {
      C of_lam[kAcross] = {};
#pragma unroll
      for (int b = 0; b < kAcross; ++b) {
        if (!Whole && j + b >= r) continue;
        const int c = (j + b) * n + i, above = c >> log;
        const C sign = minus((above & part) ^ (m[0] & (j + b)), ~0) ? C(-1) : C(1);
        const C factor = sign * x[c];
        C v[kWidth];
        load_run<kWidth>(row_at(numbers, c & ((1 << log) - 1)), v);
#pragma unroll
        for (int u = 0; u < kWidth; ++u) {
          if (!Whole && minus(m[u] ^ m[0], j + b)) v[u] = -v[u];
          of_gam[u] += factor * v[u];
          of_lam[b] += g[u] * v[u];
        }
        of_lam[b] *= sign;
      }
      const C sum = warp_sums<kAcross, 1, kAcross>(of_lam);
      const int own = j + threadIdx.x % kAcross;
      if (inside && (Whole || own < r)) sums[own * n + i] += sum;
    }
    for (int bit = 16; bit >= kAcross * of_warp; bit /= 2)
#pragma unroll
      for (int u = 0; u < kWidth; ++u) of_gam[u] += __shfl_xor_sync(kWarp, of_gam[u], bit);
    if (!inside || share > 0) continue;
    Pack<C, kWidth> out = part > 0 ? some.load(dgam + at) : Pack<C, kWidth>{};
#pragma unroll
    for (int u = 0; u < kWidth; ++u)
      out.set(u, out.get(u) + static_cast<C>(p.scale) * a_sign[u] * of_gam[u]);
    some.store(out, dgam + at);
  }
}

template <class S, bool Reduce, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_weight_backward_kernel(HadamardWeightBackward all, Tiling tiling, Ranks ranks,
                                    C* of_slots) {
  constexpr int kWidth = kPerAccess<C>;
  const HadamardWeightBackward p = all.expert(blockIdx.y);
  const int slots = gridDim.x, slot = blockIdx.x;
  const int K = static_cast<int>(p.sizes.K()), n = static_cast<int>(p.sizes.n);
  const int from_k = threadIdx.x % (kColumns / kWidth) * kWidth;
  C* numbers = reinterpret_cast<C*>(shared_memory()) + from_k;
  C *sums = numbers - from_k + numbers_of(tiling.log), *x = sums + K;
  for (int c = threadIdx.x; c < K; c += blockDim.x)
    sums[c] = C(0), x[c] = static_cast<const C*>(p.lam)[c] * p.col_signs[c];
  const int last = static_cast<int>((slot + 1) * int64_t{tiling.tiles} / slots);
  for (int tile = static_cast<int>(slot * int64_t{tiling.tiles} / slots); tile < last; ++tile)
    for (int part = 0; part < tiling.parts; ++part) {
      const int k = tile * kColumns + from_k;
      read_part<Reduce, S>(p, tiling, part, k, numbers);
      __syncthreads();
      column_passes(numbers, tiling.log);
      // The block takes one way: lanes meet in shuffles.
      if (p.sizes.r == ranks.of_lane << ranks.split && tile * kColumns % n + kColumns <= n)
        mix_part<true>(p, tiling.log, ranks, part, k, numbers, x, sums);
      else
        mix_part<false>(p, tiling.log, ranks, part, k, numbers, x, sums);
      __syncthreads();
    }
  C* out = of_slots + (int64_t{blockIdx.y} * slots + slot) * K;
  for (int c = threadIdx.x; c < K; c += blockDim.x) out[c] = sums[c];
}

}  // namespace

// Two launches.
void hadamard_weight_backward(const HadamardWeightBackward& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr int kWidth = kPerAccess<C>, kAcross = kColumns / kWidth, kLanes = 32 / kAcross;
    const int64_t d = p.sizes.d, D = p.sizes.D, n = p.sizes.n, r = p.sizes.r, K = p.sizes.K();
    Tiling t = tiling_of<S>(p, nullptr);
    const auto shared = [&] { return (numbers_of(t.log) + 2 * K) * int64_t{sizeof(C)}; };
    // Two blocks on a multiprocessor, unless that leaves few rows.
    while (t.log > 3 && shared() > device.shared_bytes / (t.log > 10 ? 2 : 1) - 1024) --t.log;
    t.parts = static_cast<int>(ceil_div(std::min(D, int64_t{1} << t.log_all), int64_t{1} << t.log));
    const int threads = threads_of<C>(t.log, device);
    Ranks ranks{0, 0, aligned_rows(d, kWidth, p.gam, p.dgam)};
    while (1 << ranks.split < kLanes && n << (ranks.split + 1) <= threads / 32 * kLanes &&
           kAcross << ranks.split < r)
      ++ranks.split;
    ranks.of_lane = static_cast<int>(ceil_div(r, kAcross << ranks.split)) * kAcross;
    // Rounded down: blocks beyond two rounds of two on each multiprocessor would need a third.
    const int64_t of_expert = std::max<int64_t>(4 * device.multiprocessors / p.experts, 1);
    const int64_t slots = std::min(ceil_div(t.tiles, 2), of_expert);
    C* sums = scratch<C>(device, p.experts * slots * K);
    launch(device, "hadamard_weight_backward",
           p.reduce ? hadamard_weight_backward_kernel<S, true>
                    : hadamard_weight_backward_kernel<S, false>,
           Grid(slots, p.experts), threads, shared(), p, t, ranks, sums);
    HadamardSlotSums of_slots{};
    of_slots.sizes = p.sizes;
    of_slots.sums = sums;
    of_slots.slots = slots;
    of_slots.col_signs = p.col_signs;
    of_slots.dlam = p.dlam;
    of_slots.dtype = p.dtype;
    of_slots.scale = p.scale;
    add_slots(of_slots, p.experts, device);
  });
}

}  // namespace randlora::cuda
