// y[t, o] = scale row[o] sum over c of H[o, c] v[c] [+ y], with c = j * n + i and
//
//   v[c] = col[c] lam[c] * sum over m of H[j, m] z[m, t, i]
//
// A thread block takes one token, or several if rows are short. Threads mix the rank indices in
// registers and write them to shared memory; the low pass multiplies by lam and col; the last bits
// go from shared memory to y. Rows o and o + N of H are equal, so a sum serves every N-th element.
//
// Floor: z read, y read and written once: with 16 bits 6 bytes an element, against some 35
// instructions. lam, col and row come from L1 for every token but the first.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned, class C = ComputeOf<S>>
__device__ __forceinline__ void write_y(const HadamardUp& p, const Rows<C>& rows, int log,
                                        int64_t t0, int tokens) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const int64_t D = p.sizes.D;
  const int N = 1 << log;
  const C scale = static_cast<C>(p.scale);
  for (int g = threadIdx.x; g < tokens << log >> kBits<C>; g += blockDim.x) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<V>(v);
    S* y = static_cast<S*>(p.y) + (t0 + at.row) * D;
    const float* row = p.row;
#pragma unroll 1
    for (int64_t left = D; left > 0; left -= N, y += N, row += N) {
      const int end = static_cast<int>(min(left, int64_t{N}));
      if constexpr (Aligned) {
        // All loads before the first store, which the compiler cannot know to be elsewhere.
        Pack<S, V> old[At::kCount] = {};
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const int o = at.at(e);
          if (p.accumulate && o < end) old[e] = *reinterpret_cast<const Pack<S, V>*>(y + o);
        }
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const int o = at.at(e);
          if (o >= end) continue;
          float sign[V];
          load_run<V>(row + o, sign);
          Pack<S, V> to = {};
#pragma unroll
          for (int u = 0; u < V; ++u)
            to.set(u, narrow<S>(widen(old[e].get(u)) + scale * (v[e * V + u] * sign[u])));
          to.store(y + o);
        }
      } else {
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          S old[V] = {};
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.at(e, u);
            if (p.accumulate && o < end) old[u] = y[o];
          }
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.at(e, u);
            if (o < end) y[o] = narrow<S>(widen(old[u]) + scale * (v[e * V + u] * row[o]));
          }
        }
      }
    }
  }
}

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, Aligned ? 2 : 1)
    hadamard_up_kernel(HadamardUp p, Diagonal<C> diagonal, int log, int64_t of_block) {
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t t0 = blockIdx.x * of_block;
  const int tokens = static_cast<int>(min(of_block, p.T - t0)), N = 1 << log;
  write_mixed<ClassOf<S>>(p.sizes, p.z, p.T, rows, log, t0, tokens);
  __syncthreads();
  low_pass(rows, tokens << log, [&](auto& v, int x) {
    diagonal.apply(v, x & (N - 1));
    hadamard<1>(v);
  });
  __syncwarp();  // the next pass takes the bits that follow: each warp reads what it has written
  middle_passes(rows, log, kEdgeBits<S>, tokens << log);
  write_y<S, Aligned>(p, rows, log, t0, tokens);
}

}  // namespace

// One launch.
void hadamard_up(const HadamardUp& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    const Plan<S> plan(p.sizes, p.T / device.multiprocessors, device);
    launch(device, "hadamard_up",
           aligned_rows(p.sizes.D, kPerAccess<S>, p.y, p.row) ? hadamard_up_kernel<S, true>
                                                              : hadamard_up_kernel<S, false>,
           ceil_div(p.T, plan.rows), plan.threads, plan.shared, p, Diagonal<ComputeOf<S>>(p),
           plan.log, plan.rows);
  });
}

}  // namespace randlora::cuda
