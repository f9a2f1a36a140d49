// From rows of v in shared memory to rows of a matrix (rows, D):
//
//   out[first + t, o] = base[first + t, o] + scale row[o] * sum over c of H[o, c] v'[t, c]
// with v'[t, c] = col[c] lam[c] v[t, c]. Rows o and o + N of H are equal, so a sum serves every
// N-th element.
#pragma once
#include "../device/rounded_store.h"
#include "transform.h"

namespace randlora::cuda {

template <class S>
struct RowsOut {
  RoundedStore<S> store;
  const float* row;
  int64_t D;
  bool aligned;

  template <class P>
  RANDLORA_HD_MEMBER RowsOut(const P& p, void* out, const void* base)
      : store{static_cast<S*>(out), static_cast<const S*>(base),
              static_cast<ComputeOf<S>>(p.scale)},
        row(p.row),
        D(p.sizes.D),
        aligned(aligned_rows(D, kPerAccess<S>, store.out, store.base, row)) {}
};

// The bits of the edge.
template <bool Aligned, class S, class C = ComputeOf<S>>
__device__ __forceinline__ void write_rows(const RowsOut<S>& out, const Rows<C>& rows, int log,
                                           int64_t first, int count) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const RoundedStore<S>& store = out.store;
  const int N = 1 << log;
  for (int g = threadIdx.x; g < count << log >> kBits<C>; g += blockDim.x) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<V>(v);
    int64_t begin = (first + at.row) * out.D;
    const float* row = out.row;
#pragma unroll 1
    for (int left = static_cast<int>(out.D); left > 0; left -= N, begin += N, row += N) {
      const int end = min(left, N);
      // All loads before the first store, which the compiler cannot know to be elsewhere.
      if constexpr (Aligned) {
        Pack<S, V> x[At::kCount] = {};
#pragma unroll
        for (int e = 0; e < At::kCount; ++e)
          if (store.base) x[e] = at.columns(e, end).load(store.base + begin);
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          const auto c = at.columns(e, end);
          if (!c.inside(0)) continue;
          const auto sign = c.load(row);
#pragma unroll
          for (int u = 0; u < V; ++u)
            x[e].set(u, store.rounded(v[e * V + u] * sign.get(u), x[e].get(u)));
          c.store(store.out + begin, x[e]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < At::kCount; ++e) {
          S old[V] = {};
#pragma unroll
          for (int u = 0; u < V; ++u)
            if (store.base && at.at(e, u) < end) old[u] = store.base[begin + at.at(e, u)];
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.at(e, u);
            if (o < end) store.out[begin + o] = store.rounded(v[e * V + u] * row[o], old[u]);
          }
        }
      }
    }
  }
}

template <bool Aligned, class S, class C = ComputeOf<S>>
__device__ __forceinline__ void transform_and_write(const Diagonal<C>& diagonal,
                                                    const RowsOut<S>& out, const Rows<C>& rows,
                                                    int log, int64_t first, int count) {
  low_pass(rows, log, count, diagonal.K, [&](auto& v, int, int c) {
    diagonal.apply(v, c);
    hadamard<1>(v);
  });
  __syncwarp();  // the next pass takes the bits that follow: each warp reads what it has written
  middle_passes(rows, log, kEdgeBits<S>, count << log);
  write_rows<Aligned>(out, rows, log, first, count);
}

}  // namespace randlora::cuda
