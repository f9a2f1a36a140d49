// The factored path of block bases for a handful of tokens, as in decoding, straight from sign
// bits, lambda and gamma: one kernel a side, sums and V in the compute type.
//
//   down   V[c, t] = sum_k M[c, k] x[t, k]     a warp per row c, lanes over its chunk's columns k
//   up     y[t, k] (+)= sum_c V[c, t] M[c, k]  a lane per column k, warps over its chunk's rows c
//
// M is A', whose element is lam[c] a[j, k] gam[i, k], or B transposed, which is +-1. The rows of a
// chunk follow each other in A', and are `groups` apart in B.
//
// Floor: gamma read once, 4 n d bytes, and B's bits; T K (d + D) / groups multiply-adds. Latency
// dominates. Tokens are taken four at a time, so many of them read everything many times.
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../device/warp_sums.h"
#include "../kernels.h"

namespace randlora {
namespace cuda {
namespace {

enum class Side { a, b };

constexpr int kAhead = 8;  // rows that a lane of `up` loads at a time

// The blocks of one side: `groups` of (rows, width).
template <class S, Side side>
struct Factor {
  using C = typename ComputeOf<S>::type;
  int rows, groups, width, n;
  int64_t d;
  const int8_t* a;
  const C *lam, *gam;
  Planes b;

  explicit Factor(const BlockLinear& p)
      : rows(static_cast<int>(p.blocks.r * p.blocks.n / p.blocks.groups)),
        groups(static_cast<int>(p.blocks.groups)),
        width(static_cast<int>((side == Side::a ? p.blocks.d : p.blocks.D) / groups)),
        n(static_cast<int>(p.blocks.n)),
        d(p.blocks.d),
        a(p.blocks.a),
        lam(static_cast<const C*>(p.lam)),
        gam(static_cast<const C*>(p.gam)),
        b(p.blocks.b) {}

  int64_t features() const { return int64_t{width} * groups; }
  __device__ __forceinline__ int group_of(int c) const {
    return side == Side::a ? c / rows : c % groups;
  }
  __device__ __forceinline__ int row(int group, int at) const {
    return side == Side::a ? group * rows + at : group + at * groups;
  }
  __device__ __forceinline__ const int8_t* signs(int c) const { return a + int64_t{c / n} * width; }
  __device__ __forceinline__ const C* gamma(int c, int group) const {
    return gam + c % n * d + int64_t{group} * width;
  }

  __device__ __forceinline__ C one(int c, int group, int k) const {
    if constexpr (side == Side::a) return lam[c] * static_cast<C>(signs(c)[k]) * gamma(c, group)[k];
    const int64_t word = c * b.words + k / 64;
    return static_cast<C>(static_cast<int>(b.plus[word] >> k % 64 & 1) -
                          static_cast<int>(b.minus[word] >> k % 64 & 1));
  }

  // Without lambda.
  template <int V, bool Aligned>
  __device__ __forceinline__ void several(int c, int group, const Columns<V, Aligned>& at,
                                          C (&m)[V]) const {
    if constexpr (side == Side::a) {
      const Pack<C, V> g = at.load(gamma(c, group));
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
      const uint32_t plus = at.bits(b.plus + c * b.words), minus = at.bits(b.minus + c * b.words);
#pragma unroll
      for (int v = 0; v < V; ++v)
        m[v] = static_cast<C>(static_cast<int>(plus >> v & 1) - static_cast<int>(minus >> v & 1));
    }
  }
};

template <class S, Side side, int TT, bool Aligned, class C = typename ComputeOf<S>::type>
__global__ void block_down_kernel(Factor<S, side> p, const S* __restrict__ x, int T, int K,
                                  C* __restrict__ V) {
  constexpr int N = kPerAccess<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int c = blockIdx.x * (blockDim.x / 32) + warp, t0 = blockIdx.y * TT;
  if (c >= K) return;
  const int group = p.group_of(c);
  const int64_t features = int64_t{p.width} * p.groups;
  const S* chunk = x + int64_t{group} * p.width;
  C sum[TT] = {};
#pragma unroll 2
  for (int from = 0; from < p.width; from += 32 * N) {
    const Columns<N, Aligned> at(from, lane, p.width);
    Pack<S, N> z[TT];
#pragma unroll
    for (int t = 0; t < TT; ++t) z[t] = at.load(chunk + min(t0 + t, T - 1) * features);
    C m[N];
    p.several(c, group, at, m);
#pragma unroll
    for (int t = 0; t < TT; ++t)
#pragma unroll
      for (int v = 0; v < N; ++v) sum[t] += m[v] * widen(z[t].get(v));
  }
  const C total = warp_sums<TT>(sum);
  const int t = t0 + lane / (32 / TT);
  if (lane % (32 / TT) == 0 && t < T)
    V[int64_t{c} * T + t] = side == Side::a ? p.lam[c] * total : total;
}

template <class S, Side side, int TT, class C = typename ComputeOf<S>::type>
__global__ void block_up_kernel(Factor<S, side> p, const C* __restrict__ V, int T, C scale,
                                S* __restrict__ y, bool accumulate) {
  C* parts = reinterpret_cast<C*>(shared_memory());  // (warps, TT, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int across = static_cast<int>(ceil_div(p.width, 32));
  const int group = blockIdx.x / across, k0 = blockIdx.x % across * 32, t0 = blockIdx.y * TT;
  const int k = min(k0 + lane, p.width - 1);  // columns past the end are not stored
  C sum[TT] = {};
  for (int first = warp * kAhead; first < p.rows; first += warps * kAhead) {
    C m[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q)
      m[q] = p.one(p.row(group, min(first + q, p.rows - 1)), group, k);
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      if (first + q >= p.rows) break;
      const C* values = V + int64_t{p.row(group, first + q)} * T;
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
    S* out = y + (int64_t{t} * p.groups + group) * p.width + column;
    *out = narrow<S>(accumulate ? widen(*out) + scale * total : scale * total);
  }
}

template <class S, Side from, Side to, int TT>
void multiply(const BlockLinear& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  constexpr int V = kPerAccess<S>;
  const Factor<S, from> down(p);
  const Factor<S, to> up(p);
  const int T = static_cast<int>(p.T), K = static_cast<int>(p.blocks.r * p.blocks.n);
  const int threads = std::min(device.max_threads, 256), warps = threads / 32;
  const unsigned tokens = static_cast<unsigned>(ceil_div(T, TT));
  const S* x = static_cast<const S*>(p.x);
  C* between = scratch<C>(device, int64_t{K} * T);
  const bool aligned = aligned_rows(down.width, V, x, down.a, down.gam);
  launch(
      device, "block_down",
      aligned ? block_down_kernel<S, from, TT, true, C> : block_down_kernel<S, from, TT, false, C>,
      dim3(static_cast<unsigned>(ceil_div(K, warps)), tokens), threads, 0, down, x, T, K, between);
  launch(device, "block_up", block_up_kernel<S, to, TT, C>,
         dim3(static_cast<unsigned>(ceil_div(up.width, 32) * up.groups), tokens), threads,
         warps * TT * 32 * int64_t{sizeof(C)}, up, between, T, static_cast<C>(p.scale),
         static_cast<S*>(p.y), p.accumulate);
}

template <class S, int TT>
void multiply_oriented(const BlockLinear& p, Device& device) {
  p.expand ? multiply<S, Side::a, Side::b, TT>(p, device)
           : multiply<S, Side::b, Side::a, TT>(p, device);
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
