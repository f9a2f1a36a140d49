// dW = scale * B A' [+ base] (D, d), or its transpose, for B as bit planes.
//
// A block makes 128 rows o by N columns k of B A' (ternary_tile.h). Slots are (j, i): an outer loop
// over chunks of 16 bases i, an inner one over quads of rank indices j. A thread owns a column k:
// it keeps gamma[i, k] of the chunk in registers, and in every step makes
//
//   A'[(j, i), k] = A[j, k] * (lambda[j, i] * gamma[i, k])     4 x 16 slots
//
// of its column, rounded once to the storage type, for the step after this one. Neither A' nor a
// dense B exists outside a block.
//
// Floor: dW written once; 2 D K d operations on the tensor cores. mma.sync does not reach the peak
// of wgmma. With two blocks a multiprocessor, one forms and decodes while the other multiplies.
//
// Zeros of A are exact: A' is 0 there whatever lambda and gamma are. FMA (f32, f64) skips zeros of
// B; on tensor cores an infinite or NaN A'[c, k] makes column k of B A' NaN in all rows.
#include <algorithm>

#include "../device/ternary_io.h"
#include "../kernels.h"
#include "delta_planes.h"

namespace randlora::cuda {
namespace {

template <class S>
struct Formation {
  using C = ComputeOf<S>;
  DeltaShape shape;
  const uint32_t *codes, *signs;
  const C *lam, *gam;
  int64_t row_blocks;
  Output<RoundedStore<S>> out;
};

// f16 has few exponents, and lambda * gamma is small. So each column of A' is scaled by a 2^e that
// keeps all products below 2^15, and the column of B A' by 2^-e.
template <class S>
constexpr bool kScaled = std::is_same<S, f16>::value;

template <class S>
struct FormationMemory {
  using C = ComputeOf<S>;
  static constexpr int N = kColumns<S>, kStride = TernaryTile<S, N>::stride(kSlots);
  static int64_t bytes() {
    const int64_t loop =
        2 * (kCodeWords * 4 + N * kStride * int64_t(sizeof(S)) + kSlots * int64_t(sizeof(C))) +
        (kScaled<S> ? 2 * N : 0) * int64_t(sizeof(C));
    return std::max(
        {loop, store_bytes<false, TernaryTile<S, N>>(), store_bytes<true, TernaryTile<S, N>>()});
  }
  static __device__ __forceinline__ uint32_t* codes(int half) {
    return reinterpret_cast<uint32_t*>(shared_memory()) + half * kCodeWords;
  }
  static __device__ __forceinline__ S* operand(int half) {
    return reinterpret_cast<S*>(codes(2)) + half * (N * kStride);
  }
  static __device__ __forceinline__ C* lam(int half) {
    return reinterpret_cast<C*>(operand(2)) + half * kSlots;
  }
  // (N) each, if columns are scaled.
  static __device__ __forceinline__ C* factor() { return lam(2); }
  static __device__ __forceinline__ C* inverse() { return factor() + N; }
};

__device__ __forceinline__ int spare_exponent(float most_lam, float most_gam) {
  const int l = bits_of_float(most_lam) >> 23, g = bits_of_float(most_gam) >> 23;
  return max(-100, min(13 - (l - 127) - (g - 127), min(100, 253 - g)));  // 2^e gamma is finite
}
__device__ __forceinline__ float power_of_two(int e) {
  return float_of_bits(static_cast<uint32_t>(127 + e) << 23);
}
__device__ __forceinline__ float larger_finite(float most, float x) {
  return fabsf(x) <= 3.4028235e38f ? fmaxf(most, fabsf(x)) : most;
}

// One column k of A', formed by its thread. (Threads past column d repeat the last one.)
template <class S>
struct FormedColumn {
  using C = ComputeOf<S>;
  static constexpr int N = kColumns<S>, kGroups = kTileThreads / N;  // groups share a step's j
  const DeltaShape& shape;
  const C *lam_, *gam_;    // all of (r, n), and column k of (n, d)
  const uint32_t* signs_;  // column k of (quads, d)
  C gam[kBases];

  __device__ __forceinline__ FormedColumn(const Formation<S>& p, int64_t col0)
      : shape(p.shape), lam_(p.lam) {
    const int64_t k = min(col0 + threadIdx.x % N, p.shape.d - 1);
    gam_ = p.gam + k, signs_ = p.signs + k;
  }

  // Puts the column's power of two, and its inverse, in shared memory.
  __device__ __forceinline__ void choose_factor() {
    static_assert(N == kTileThreads, "a thread has a column");
    float most_lam = 0, most_gam = 0;
#pragma unroll 8
    for (int64_t c = threadIdx.x; c < shape.r * shape.n; c += kTileThreads)
      most_lam = larger_finite(most_lam, lam_[c]);
#pragma unroll 8
    for (int64_t i = 0; i < shape.n; ++i) most_gam = larger_finite(most_gam, gam_[i * shape.d]);
    C* factor = FormationMemory<S>::factor();
    factor[threadIdx.x] = most_lam;
    __syncthreads();
    for (int t = 0; t < kTileThreads; ++t) most_lam = fmaxf(most_lam, factor[t]);
    __syncthreads();
    const int e = spare_exponent(most_lam, most_gam);
    factor[threadIdx.x] = power_of_two(e);
    FormationMemory<S>::inverse()[threadIdx.x] = power_of_two(-e);
  }

  __device__ __forceinline__ void load_gamma(int chunk) {
    const C* at = gam_ + chunk * kBases * shape.d;
    const int64_t left = shape.n - chunk * kBases;
    C factor = C(1);
    if constexpr (kScaled<S>) factor = FormationMemory<S>::factor()[threadIdx.x];
#pragma unroll
    for (int b = 0; b < kBases; ++b, at += shape.d) gam[b] = b < left ? factor * *at : C(0);
  }
  __device__ __forceinline__ uint32_t load_signs(int quad) const { return signs_[quad * shape.d]; }

  // Lambda of slot threadIdx.x.
  __device__ __forceinline__ C load_lambda(int chunk, int quad) const {
    const int j = quad * kQuad + threadIdx.x / kBases, i = chunk * kBases + threadIdx.x % kBases;
    return threadIdx.x < kSlots && j < shape.r && i < shape.n ? lam_[j * shape.n + i] : C(0);
  }

  __device__ __forceinline__ void form(S* operand, const C* lam, uint32_t signs) const {
    constexpr int V = kPerAccess<S>;
    operand += threadIdx.x % N * FormationMemory<S>::kStride;
#pragma unroll
    for (int turn = 0; turn < kQuad / kGroups; ++turn) {
      const int q = turn * kGroups + threadIdx.x / N;
      const int sign = sign_of(signs, q);
#pragma unroll
      for (int b = 0; b < kBases; b += V) {
        C v[V];
        load_run<V>(lam + q * kBases + b, v);
#pragma unroll
        for (int e = 0; e < V; ++e) v[e] *= gam[b + e];
        *reinterpret_cast<Pack<S, V>*>(operand + q * kBases + b) = signed_pack(v, sign);
      }
    }
  }

 private:
  static __device__ __forceinline__ Pack<S, kPerAccess<S>> signed_pack(const C (&v)[kPerAccess<S>],
                                                                       int sign) {
    Pack<S, kPerAccess<S>> p;
    if constexpr (sizeof(S) == 2) {
      const uint32_t bits = static_cast<uint32_t>(sign), some = 0u - (bits & 1u),
                     minus = bits & 0x80008000u;
#pragma unroll
      for (int w = 0; w < 4; ++w) p.word[w] = (pack<S>(v[2 * w], v[2 * w + 1]) ^ minus) & some;
    } else {
#pragma unroll
      for (int e = 0; e < kPerAccess<S>; ++e) p.set(e, sign == 0 ? S(0) : sign < 0 ? -v[e] : v[e]);
    }
    return p;
  }
};

template <class S, bool Tf32, bool Transposed>
__global__ void __launch_bounds__(kTileThreads, 1) delta_planes_kernel(Formation<S> p) {
  using Shared = FormationMemory<S>;
  using C = ComputeOf<S>;
  constexpr int N = kColumns<S>;
  const int64_t row_block = blockIdx.x % p.row_blocks, col0 = blockIdx.x / p.row_blocks * N;
  const int quads = p.shape.quads(), steps = p.shape.chunks() * quads;
  const uint32_t* codes = p.codes + row_block * steps * kTileWords;

  FormedColumn<S> column(p, col0);
  if constexpr (kScaled<S>) column.choose_factor();
  column.load_gamma(0);
  load_codes(Shared::codes(0), codes);
  cp_async_commit();
  // Step s takes lambda from half s % 2, which is filled two steps ahead.
  if (threadIdx.x < kSlots) {
    Shared::lam(0)[threadIdx.x] = column.load_lambda(0, 0);
    Shared::lam(1)[threadIdx.x] = column.load_lambda(1 / quads, 1 % quads);
  }
  __syncthreads();
  column.form(Shared::operand(0), Shared::lam(0), column.load_signs(0));

  TernaryTile<S, N, Tf32> tile;
  int chunk = 1 / quads, quad = 1 % quads;  // of the next step
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const int half = s % 2;
    cp_async_wait<0>();
    __syncthreads();
    const bool more = s + 1 < steps;
    uint32_t signs = 0;
    C lam = C(0);
    if (more) {
      load_codes(Shared::codes(half ^ 1), codes += kTileWords);
      cp_async_commit();
      if (quad == 0) column.load_gamma(chunk);
      signs = column.load_signs(quad);
      if (++quad == quads) quad = 0, ++chunk;
      lam = column.load_lambda(chunk, quad);  // of the step after that
    }
    tile.template step<Order::by_line>(Shared::codes(half), Shared::operand(half), Shared::kStride);
    if (more) {
      column.form(Shared::operand(half ^ 1), Shared::lam(half ^ 1), signs);
      if (threadIdx.x < kSlots) Shared::lam(half)[threadIdx.x] = lam;
    }
  }

  if constexpr (kScaled<S>) {
#pragma unroll
    for (int n = 0; n < tile.NI; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const C inverse = Shared::inverse()[tile.col(n, e)];
#pragma unroll
        for (int m = 0; m < tile.MI; ++m) tile.warp.acc[m][n][e] *= inverse;
      }
  }
  store_tile<Transposed>(tile, shared_memory(), row_block * kLines, col0, p.out);
}

}  // namespace

void delta_weight(const DeltaWeight& p, Device& device) {
  const Basis& b = p.basis;
  if (b.has_lists()) return delta_weight_lists(p, device);
  const int64_t rows = p.transposed ? b.d : b.D, cols = p.transposed ? b.D : b.d;
  with_engine(p.dtype, device.tf32, [&](auto storage, auto tf32) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr bool kTf32 = decltype(tf32)::value;
    const Formation<S> all{DeltaShape(b),
                           row_codes(b, device),
                           signs_of_A(b, device),
                           static_cast<const C*>(p.lam),
                           static_cast<const C*>(p.gam),
                           ceil_div(b.D, kLines),
                           {RoundedStore<S>::of(p, p.scale / 2),  // codes stand for doubled numbers
                            rows, cols, aligned_rows(cols, kPerAccess<S>, p.out, p.base)}};
    const auto kernel =
        p.transposed ? delta_planes_kernel<S, kTf32, true> : delta_planes_kernel<S, kTf32, false>;
    launch(device, "delta_planes", kernel, all.row_blocks * ceil_div(b.d, kColumns<S>),
           kTileThreads, FormationMemory<S>::bytes(), all);
  });
}

}  // namespace randlora::cuda
