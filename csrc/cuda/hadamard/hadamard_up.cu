// y[t, o] = scale row[o] sum over c of H[o, c] v[c] [+ y], with c = j * n + i and
//
//   v[c] = col[c] lam[c] * sum over m of H[j, m] z[m, t, i]
//
// A thread block takes one token, or several if rows are short. Threads mix the rank indices in
// registers and write v to shared memory; the transform's last bits go from shared memory to y.
// Rows o and o + N of H are equal, so a sum serves every N-th element of y.
//
// Floor: z read, y read and written once: with 16 bits 6 bytes an element, against some 17
// additions. lam, col and row come from L1 for every token but the first.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora {
namespace cuda {
namespace {

// Writes v of `tokens` tokens from t0 on.
template <class S, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void write_mixed(const HadamardUp& p, const Rows<C, Scratch>& rows,
                                            int log, int64_t t0, int64_t tokens,
                                            const Share& share) {
  using Index = typename Rows<C, Scratch>::Index;
  const Mixed<S> z(p.sizes, p.z, p.T, t0);
  const C* lam = static_cast<const C*>(p.lam);
  const Index n = Index(p.sizes.n), columns = Index(tokens) * n, K = Index(p.sizes.K());
  with_block_of_ranks<C>(p.sizes.r, [&](auto m) {
    constexpr int M = decltype(m)::value;
    const Index items = columns * Index(ceil_div(p.sizes.r, M));
    for (Index item = Index(share.first); item < items; item += Index(share.step)) {
      const Index block = item / columns, q = item - block * columns, t = q / n, i = q - t * n;
      C v[M];
      z.get(v, block, q);
#pragma unroll
      for (int e = 0; e < M; ++e) {
        const Index c = (block * M + e) * n + i;
        if (block * M + e < Index(p.sizes.r))
          *rows.at((t << log) + c) = with_sign(lam[c] * v[e], p.col[c]);
      }
    }
  });
  const Index rest = (Index{1} << log) - K;
  for (Index item = Index(share.first); item < Index(tokens) * rest; item += Index(share.step))
    *rows.at((item / rest << log) + K + item % rest) = C(0);
}

template <class S, bool Aligned, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void write_y(const HadamardUp& p, const Rows<C, Scratch>& rows, int log,
                                        int64_t t0, int64_t tokens, const Share& share) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const int64_t N = int64_t{1} << log, items = tokens << log >> kBits<C>;
  const C scale = static_cast<C>(p.scale);
  for (int64_t g = share.first; g < items; g += share.step) {
    const At at(g, log);
    C v[kValues<C>];
    at.load(rows, v);
    hadamard<V>(v);
    S* y = static_cast<S*>(p.y) + (t0 + at.row) * p.sizes.D;
#pragma unroll
    for (int e = 0; e < At::kCount; ++e) {
      if constexpr (Aligned) {
        for (int64_t o = (at.first + at.place(e) - p.sizes.first_row) & (N - 1); o < p.sizes.D;
             o += N) {
          const auto sign = *reinterpret_cast<const Piece<int8_t, V>*>(p.row + o);
          Pack<S, V> to = {};
          if (p.accumulate) to = *reinterpret_cast<const Pack<S, V>*>(y + o);
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const C x = scale * with_sign(v[e * V + u], sign.v[u]);
            to.set(u, narrow<S>(p.accumulate ? widen(to.get(u)) + x : x));
          }
          to.store(y + o);
        }
      } else {
#pragma unroll
        for (int u = 0; u < V; ++u)
          for (int64_t o = (at.column(u) + at.place(e) - p.sizes.first_row) & (N - 1);
               o < p.sizes.D; o += N) {
            const C x = scale * with_sign(v[e * V + u], p.row[o]);
            y[o] = narrow<S>(p.accumulate ? widen(y[o]) + x : x);
          }
      }
    }
  }
}

template <class S, bool Aligned>
__global__ void hadamard_up_kernel(HadamardUp p, int log, int64_t of_block) {
  using C = typename ComputeOf<S>::type;
  const Rows<C, false> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t t0 = blockIdx.x * of_block, tokens = min(of_block, p.T - t0);
  write_mixed<S>(p, rows, log, t0, tokens, share_of_block());
  transform_in_block(rows, log, kEdgeBits<S>, of_block << log);
  write_y<S, Aligned>(p, rows, log, t0, tokens, share_of_block());
}

template <class S>
__global__ void hadamard_up_mix_kernel(HadamardUp p, typename ComputeOf<S>::type* scratch, int log,
                                       int64_t t0, int64_t tokens) {
  write_mixed<S>(p, Rows<typename ComputeOf<S>::type, true>{scratch}, log, t0, tokens,
                 share_of_grid());
}
template <class S>
__global__ void hadamard_up_store_kernel(HadamardUp p, typename ComputeOf<S>::type* scratch,
                                         int log, int64_t t0, int64_t tokens) {
  write_y<S, false>(p, Rows<typename ComputeOf<S>::type, true>{scratch}, log, t0, tokens,
                    share_of_grid());
}

template <class S>
void up(const HadamardUp& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  const Plan<S> plan(p.sizes, p.T, device);
  if (plan.fits(device)) {
    constexpr int V = kPerAccess<S>;
    const bool aligned = aligned_rows(p.sizes.D, V, p.y) && p.sizes.first_row % V == 0 &&
                         reinterpret_cast<uintptr_t>(p.row) % V == 0;
    launch(device, "hadamard_up",
           aligned ? hadamard_up_kernel<S, true> : hadamard_up_kernel<S, false>,
           static_cast<unsigned>(ceil_div(p.T, plan.rows)), plan.threads, plan.shared, p, plan.log,
           plan.rows);
    return;
  }
  InScratch<C> all(plan.log, p.T, device);
  all.each([&](int64_t t0, int64_t tokens) {
    launch(device, "hadamard_up_mix", hadamard_up_mix_kernel<S>, all.blocks(tokens * p.sizes.n),
           all.threads, 0, p, all.numbers, plan.log, t0, tokens);
    all.transform(kEdgeBits<S>, tokens);
    launch(device, "hadamard_up_store", hadamard_up_store_kernel<S>,
           all.blocks(tokens << plan.log >> kBits<C>), all.threads, 0, p, all.numbers, plan.log, t0,
           tokens);
  });
}

}  // namespace

// One launch, if rows of N numbers fit shared memory; else several for each chunk of tokens.
void hadamard_up(const HadamardUp& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) { up<decltype(s)>(p, device); });
}

}  // namespace cuda
}  // namespace randlora
