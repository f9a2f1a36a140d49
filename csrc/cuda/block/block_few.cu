// The factored path for block bases and a handful of tokens, as in decoding. It reads sign bits,
// lambda and gamma directly: one kernel per side, sums and V in the compute type.
//
//   down   V[e, t] = sum_k M[e, k] x[t, k]     a warp per row e, lanes over its chunk's columns k
//   up     y[t, k] (+)= sum_e V[e, t] M[e, k]  a lane per column k, warps over its chunk's rows e
//
// M is A' or B transposed. Row e of A' has the elements lam[c] a[j, k] gam[i, k], c = row(e) (see
// BlockSizes; in a whole layer c is e). B's elements are +-1. The rows of a chunk are consecutive
// in A' and b_chunks apart in B.
//
// Floor: gamma read once, 4 n d bytes, and B's bits; T K (d + D) / groups multiply-adds. Latency
// dominates. Every four tokens read everything again.
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../device/warp_sums.h"
#include "../kernels.h"

namespace randlora {
namespace cuda {
namespace {

enum class Matrix { A, B };

constexpr int kAhead = 8;  // rows that a lane of `up` loads at a time

// The blocks of one matrix: for each of `chunks` chunks, (rows e of the chunk, width).
template <class S, Matrix matrix>
struct MatrixBlocks {
  using C = typename ComputeOf<S>::type;
  BlockSizesOf<int> sizes;
  int rows, chunks, width;  // `rows`: rows c in each chunk of d
  const int8_t* a;
  const C *lam, *gam;
  Planes b;

  explicit MatrixBlocks(const BlockLinear& p)
      : sizes(p.blocks.as<int>()),
        rows(sizes.a_rows()),
        chunks(matrix == Matrix::A ? sizes.a_chunks : sizes.b_chunks),
        width(matrix == Matrix::A ? sizes.a_width() : sizes.b_width()),
        a(p.blocks.a),
        lam(static_cast<const C*>(p.lam)),
        gam(static_cast<const C*>(p.gam)),
        b(p.blocks.b) {}

  int64_t features() const { return int64_t{width} * chunks; }
  __device__ __forceinline__ int chunk_of(int e, int c) const {
    return matrix == Matrix::A ? c / rows : e % sizes.b_chunks;
  }
  // The rows e of a chunk: first, first + step, ...
  struct Rows {
    int first, step, count;
  };
  __device__ __forceinline__ Rows rows_of(int chunk) const {
    if constexpr (matrix == Matrix::A) {
      const int first = sizes.before(chunk * rows);
      return {first, 1, sizes.before((chunk + 1) * rows) - first};
    }
    const int first = sizes.row(chunk) < 0 ? chunk + sizes.b_chunks : chunk;
    return {first, sizes.b_chunks,
            (sizes.K() - sizes.row(first) + sizes.groups - 1) / sizes.groups};
  }
  __device__ __forceinline__ const int8_t* signs(int c) const {
    return a + int64_t{c / sizes.n} * width;
  }
  __device__ __forceinline__ const C* gamma(int c, int chunk) const {
    return gam + int64_t{c % sizes.n} * sizes.d + int64_t{chunk} * width;
  }

  __device__ __forceinline__ C one(int e, int chunk, int k) const {
    if constexpr (matrix == Matrix::A) {
      const int c = sizes.row(e);
      return lam[c] * static_cast<C>(signs(c)[k]) * gamma(c, chunk)[k];
    }
    const int64_t word = e * b.words + k / 64;
    return b.plus[word] >> k % 64 & 1 ? C(1) : C(-1);
  }

  // Leaves out lambda, by which block_down_kernel multiplies the sum.
  template <int V, bool Aligned>
  __device__ __forceinline__ void several(int e, int c, int chunk, const Columns<V, Aligned>& at,
                                          C (&m)[V]) const {
    if constexpr (matrix == Matrix::A) {
      const Pack<C, V> g = at.load(gamma(c, chunk));
      struct alignas(Aligned ? V : 1) Signs {
        int8_t v[V];
      } s = {};
      if constexpr (Aligned) {
        if (at.inside(0)) s = *reinterpret_cast<const Signs*>(signs(c) + at.first);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (at.inside(v)) s.v[v] = signs(c)[at.at(v)];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) m[v] = static_cast<C>(s.v[v]) * g.get(v);
    } else {
      const uint32_t plus = at.bits(b.plus + e * b.words);
#pragma unroll
      for (int v = 0; v < V; ++v) m[v] = plus >> v & 1 ? C(1) : C(-1);
    }
  }
};

template <class S, Matrix matrix, int TT, bool Aligned, class C = typename ComputeOf<S>::type>
__global__ void block_down_kernel(MatrixBlocks<S, matrix> p, const S* __restrict__ x, int T,
                                  C* __restrict__ V) {
  constexpr int N = kPerAccess<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int e = blockIdx.x * (blockDim.x / 32) + warp, t0 = blockIdx.y * TT;
  const int c = p.sizes.row(e);
  if (c < 0 || c >= p.sizes.K()) return;
  const int chunk = p.chunk_of(e, c);
  const int64_t features = int64_t{p.width} * p.chunks;
  const S* from_x = x + int64_t{chunk} * p.width;
  C sum[TT] = {};
#pragma unroll 2
  for (int from = 0; from < p.width; from += 32 * N) {
    const Columns<N, Aligned> at(from, lane, p.width);
    Pack<S, N> z[TT];
#pragma unroll
    for (int t = 0; t < TT; ++t) z[t] = at.load(from_x + min(t0 + t, T - 1) * features);
    C m[N];
    p.several(e, c, chunk, at, m);
#pragma unroll
    for (int t = 0; t < TT; ++t)
#pragma unroll
      for (int v = 0; v < N; ++v) sum[t] += m[v] * widen(z[t].get(v));
  }
  const C total = warp_sums<TT>(sum);
  const int t = t0 + lane / (32 / TT);
  if (lane % (32 / TT) == 0 && t < T)
    V[int64_t{e} * T + t] = matrix == Matrix::A ? p.lam[c] * total : total;
}

template <class S, Matrix matrix, int TT, class C = typename ComputeOf<S>::type>
__global__ void block_up_kernel(MatrixBlocks<S, matrix> p, const C* __restrict__ V, int T, C scale,
                                S* __restrict__ y, bool accumulate) {
  C* parts = reinterpret_cast<C*>(shared_memory());  // (warps, TT, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int across = static_cast<int>(ceil_div(p.width, 32));
  const int chunk = blockIdx.x / across, k0 = blockIdx.x % across * 32, t0 = blockIdx.y * TT;
  const int k = min(k0 + lane, p.width - 1);  // columns past the end are not stored
  const auto rows = p.rows_of(chunk);
  C sum[TT] = {};
  for (int first = warp * kAhead; first < rows.count; first += warps * kAhead) {
    C m[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q)
      m[q] = p.one(rows.first + min(first + q, rows.count - 1) * rows.step, chunk, k);
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      if (first + q >= rows.count) break;
      const C* values = V + int64_t{rows.first + (first + q) * rows.step} * T;
#pragma unroll
      for (int t = 0; t < TT; ++t) sum[t] += m[q] * values[min(t0 + t, T - 1)];
    }
  }
#pragma unroll
  for (int t = 0; t < TT; ++t) parts[(warp * TT + t) * 32 + lane] = sum[t];
  __syncthreads();
  for (int e = threadIdx.x; e < TT * 32; e += blockDim.x) {
    const int t = t0 + e / 32, column = k0 + e % 32;
    if (t >= T || column >= p.width) continue;
    C total = parts[e];
    for (int w = 1; w < warps; ++w) total += parts[w * TT * 32 + e];
    S* out = y + (int64_t{t} * p.chunks + chunk) * p.width + column;
    *out = narrow<S>(accumulate ? widen(*out) + scale * total : scale * total);
  }
}

template <class S, Matrix from, Matrix to, int TT>
void multiply(const BlockLinear& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  constexpr int V = kPerAccess<S>;
  const MatrixBlocks<S, from> down(p);
  const MatrixBlocks<S, to> up(p);
  const int T = static_cast<int>(p.T), rows = down.sizes.rows();
  const int threads = std::min(device.max_threads, 256), warps = threads / 32;
  const unsigned tokens = static_cast<unsigned>(ceil_div(T, TT));
  const S* x = static_cast<const S*>(p.x);
  C* between = scratch<C>(device, int64_t{rows} * T);
  const bool aligned = aligned_rows(down.width, V, x, down.a, down.gam);
  launch(
      device, "block_down",
      aligned ? block_down_kernel<S, from, TT, true, C> : block_down_kernel<S, from, TT, false, C>,
      dim3(static_cast<unsigned>(ceil_div(rows, warps)), tokens), threads, 0, down, x, T, between);
  launch(device, "block_up", block_up_kernel<S, to, TT, C>,
         dim3(static_cast<unsigned>(ceil_div(up.width, 32) * up.chunks), tokens), threads,
         warps * TT * 32 * int64_t{sizeof(C)}, up, between, T, static_cast<C>(p.scale),
         static_cast<S*>(p.y), p.accumulate);
}

template <class S, int TT>
void multiply_oriented(const BlockLinear& p, Device& device) {
  p.expand ? multiply<S, Matrix::A, Matrix::B, TT>(p, device)
           : multiply<S, Matrix::B, Matrix::A, TT>(p, device);
}

}  // namespace

void block_linear(const BlockLinear& p, Device& device) {
  if (p.T == 0) return;
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    p.T == 1 ? multiply_oriented<S, 1>(p, device) : multiply_oriented<S, 4>(p, device);
  });
}

}  // namespace cuda
}  // namespace randlora
