// y[t, o] = scale row_signs[o] sum over c of H[o, c] v[c] [+ y], with c = j * n + i and
//
//   v[c] = factors[c] * sum over m of H[j, m] z[m, t, i]
//
// A thread block takes one token, or several if rows are short. Threads mix the rank indices in
// registers and write them to shared memory; the low pass multiplies by factors; the last bits
// go from shared memory to y.
//
// Floor: z read, y written once, and read only if the layer has a bias: with 16 bits 4 bytes an
// element, against some 41 instructions. For every token but the first, factors and row_signs
// come from L1.
#include "../device/launch.h"
#include "../device/rounded_store.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora::cuda {
namespace {

// The bits of the edge, and from rows of v in shared memory to rows t0 to t0 + count of y. A sum
// serves every N-th element.
template <class S, bool Aligned, class C = ComputeOf<S>>
__device__ __forceinline__ void write_rows(const HadamardUp& p, const Rows<C>& rows, int log,
                                           int64_t t0, int count) {
  using At = Edge<S, Aligned>;
  constexpr int kWidth = At::kWidth;
  S* y = static_cast<S*>(p.y);
  const RoundedStore<S> store{y, p.accumulate ? y : nullptr, static_cast<C>(p.scale)};
  const int N = 1 << log;
  for (int g = threadIdx.x; g < count << log >> kBits<C>; g += blockDim.x) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<kWidth>(v);
    int64_t begin = (t0 + at.row) * p.sizes.D;
    const float* signs = p.row_signs;
#pragma unroll 1
    for (int left = static_cast<int>(p.sizes.D); left > 0; left -= N, begin += N, signs += N) {
      const int end = min(left, N);
      // All loads before the first store, which the compiler cannot know to be elsewhere.
      if constexpr (Aligned) {
        Pack<S, kWidth> x[At::kCount] = {};
#pragma unroll
        for (int e = 0; e < At::kCount; ++e)
          if (store.base) x[e] = at.columns(e, end).load(store.base + begin);
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const auto c = at.columns(e, end);
          if (!c.inside(0)) continue;
          const auto sign = c.load(signs);
#pragma unroll
          for (int u = 0; u < kWidth; ++u)
            x[e].set(u, store.rounded(v[e * kWidth + u] * sign.get(u), x[e].get(u)));
          c.store(store.out + begin, x[e]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          S old[kWidth] = {};
#pragma unroll
          for (int u = 0; u < kWidth; ++u)
            if (store.base && at.at(e, u) < end) old[u] = store.base[begin + at.at(e, u)];
#pragma unroll
          for (int u = 0; u < kWidth; ++u) {
            const int o = at.at(e, u);
            if (o < end) store.out[begin + o] = store.rounded(v[e * kWidth + u] * signs[o], old[u]);
          }
        }
      }
    }
  }
}

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_up_kernel(HadamardUp p, Factors<C> factors, int log, int64_t of_block) {
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t t0 = blockIdx.x * of_block;
  const int tokens = static_cast<int>(min(of_block, p.T - t0));
  mix<Aligned>(p.sizes, static_cast<const ClassOf<S>*>(p.z), p.T, rows, log, t0, tokens);
  __syncthreads();
  low_pass(rows, log, tokens, factors.K, [&](auto& v, int, int c) {
    factors.apply(v, c);
    hadamard<1>(v);
  });
  __syncwarp();  // the next pass takes the bits that follow: each warp reads what it has written
  middle_passes(rows, log, kEdgeBits<S>, tokens << log);
  write_rows<S, Aligned>(p, rows, log, t0, tokens);
}

}  // namespace

// One launch.
void hadamard_up(const HadamardUp& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const Plan<S> plan(p.sizes, p.T / device.multiprocessors, device);
    launch(device, "hadamard_up",
           aligned_rows(p.sizes.D, kPerAccess<S>, p.y, p.row_signs, p.z)
               ? hadamard_up_kernel<S, true>
               : hadamard_up_kernel<S, false>,
           ceil_div(p.T, plan.rows), plan.threads, plan.shared, p,
           Factors<ComputeOf<S>>(p.sizes, p.factors), plan.log, plan.rows);
  });
}

}  // namespace randlora::cuda
