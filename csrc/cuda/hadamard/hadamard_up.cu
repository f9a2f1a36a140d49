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
#include "scratch.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned, bool Scratch, class C = ComputeOf<S>>
__device__ __forceinline__ void write_y(const HadamardUp& p, const Rows<C, Scratch>& rows, int log,
                                        int64_t t0, int64_t tokens, const Share& share) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const int64_t D = p.sizes.D, items = tokens << log >> kBits<C>;
  const int N = 1 << log, first_row = static_cast<int>(p.sizes.first_row & (N - 1));
  const C scale = static_cast<C>(p.scale);
  for (int64_t g = share.first; g < items; g += share.step) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<V>(v);
    S* y = static_cast<S*>(p.y) + (t0 + at.row) * D;
    const int8_t* row = p.row;
#pragma unroll 1
    for (int64_t left = D; left > 0; left -= N, y += N, row += N) {
      const int end = static_cast<int>(min(left, int64_t{N}));
      if constexpr (Aligned) {
        // All loads before the first store, which the compiler cannot know to be elsewhere.
        Pack<S, V> old[At::kCount] = {};
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const int o = at.row_of(e, 0, first_row);
          if (p.accumulate && o < end) old[e] = *reinterpret_cast<const Pack<S, V>*>(y + o);
        }
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const int o = at.row_of(e, 0, first_row);
          if (o >= end) continue;
          const auto sign = *reinterpret_cast<const Piece<int8_t, V>*>(row + o);
          Pack<S, V> to = {};
#pragma unroll
          for (int u = 0; u < V; ++u)
            to.set(u, narrow<S>(widen(old[e].get(u)) + scale * with_sign(v[e * V + u], sign.v[u])));
          to.store(y + o);
        }
      } else {
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          S old[V] = {};
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.row_of(e, u, first_row);
            if (p.accumulate && o < end) old[u] = y[o];
          }
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.row_of(e, u, first_row);
            if (o < end) y[o] = narrow<S>(widen(old[u]) + scale * with_sign(v[e * V + u], row[o]));
          }
        }
      }
    }
  }
}

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, Aligned ? 2 : 1)
    hadamard_up_kernel(HadamardUp p, Diagonal<C> diagonal, int log, int64_t of_block) {
  const Rows<C, false> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t t0 = blockIdx.x * of_block, tokens = min(of_block, p.T - t0), N = int64_t{1} << log;
  const Share share = share_of_block();
  write_mixed<S>(p.sizes, p.z, p.T, rows, log, t0, tokens, share);
  __syncthreads();
  low_pass(rows, tokens << log, share, [&](auto& v, int x) {
    diagonal.apply(v, x & (N - 1));
    hadamard<1>(v);
  });
  __syncthreads();
  middle_passes(rows, log, kEdgeBits<S>, tokens << log);
  write_y<S, Aligned>(p, rows, log, t0, tokens, share);
}

template <class S, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_up_store_kernel(HadamardUp p, C* scratch, int log, int64_t t0, int64_t tokens) {
  write_y<S, false>(p, Rows<C, true>{scratch}, log, t0, tokens, share_of_grid());
}

}  // namespace

// One launch. If N numbers do not fit shared memory: for each chunk of tokens 3 launches, and one
// for each middle pass (hadamard_scratch.cu).
void hadamard_up(const HadamardUp& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const Plan<S> plan(p.sizes, p.T / device.multiprocessors, device);
    if (plan.fits(device)) {
      constexpr int V = kPerAccess<S>;
      const bool aligned = aligned_rows(p.sizes.D, V, p.y) && p.sizes.first_row % V == 0 &&
                           reinterpret_cast<uintptr_t>(p.row) % V == 0;
      launch(device, "hadamard_up",
             aligned ? hadamard_up_kernel<S, true> : hadamard_up_kernel<S, false>,
             ceil_div(p.T, plan.rows), plan.threads, plan.shared, p, Diagonal<C>(p), plan.log,
             plan.rows);
      return;
    }
    InScratch<C> all(plan.log, p.T, device);
    each_chunk(p.T, all.chunk, [&](int64_t t0, int64_t tokens) {
      all.mix(p.sizes, p.z, p.dtype, p.T, all.numbers, t0, tokens);
      all.low(true, Diagonal<C>(p), nullptr, tokens);
      all.transform(kEdgeBits<S>, tokens);
      all.start("hadamard_up_store", hadamard_up_store_kernel<S>, all.of_numbers(tokens), p,
                all.numbers, plan.log, t0, tokens);
    });
  });
}

}  // namespace randlora::cuda
