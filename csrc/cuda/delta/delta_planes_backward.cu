// The adjoint of dW = scale * B A' for B as bit planes, from the gradient G, (D, d) or (d, D):
//
//   H[c, k]     = sum_o B[o, c] G[o, k]
//   dlam[j, i]  = scale * sum_k A[j, k] gamma[i, k] H[(j, i), k]
//   dgam[i, k]  = scale * sum_j A[j, k] lambda[j, i] H[(j, i), k]
//
// H (K, d) never leaves the registers of a block, whose 128 lines are 8 rank indices j by 16 bases
// i (ternary_tile.h). The block sums over those j and over its N columns k, and writes one part of
// each gradient. A second kernel adds the parts in order.
//
// Floor: G read once; 2 D K d operations on the tensor cores.
//
// Zeros of A are skipped. FMA (f32, f64) also skips zeros of B; on tensor cores an infinite or NaN
// G[o, k] makes column k of H NaN, and with it dgam[., k], and dlam[j, .] if A[j, k] is not zero.
#include <algorithm>

#include "../device/ternary_io.h"
#include "../kernels.h"
#include "delta_planes.h"

namespace randlora::cuda {
namespace {

template <class S>
struct Contraction {
  using C = ComputeOf<S>;
  DeltaShape shape;
  const uint32_t *codes, *signs;
  const C *lam, *gam;
  const S* grad;
  bool aligned;
  C scale;
  C *dlam, *dgam;  // parts: (column blocks, r, n), (octets, n, d)
};

template <class S, bool Transposed>
struct ContractionMemory {
  using C = ComputeOf<S>;
  using Tile = TernaryTile<S, kColumns<S>>;
  static constexpr int N = kColumns<S>, kStride = Tile::stride(Transposed ? kSlots : N);
  static constexpr int kOperand = (Transposed ? N : kSlots) * kStride;
  static int64_t bytes() {
    const int64_t loop = 2 * (kCodeWords * 4 + kOperand * int64_t(sizeof(S)));
    const int64_t sums = (Tile::WN * kLines + Tile::WM * kBases * N) * int64_t(sizeof(C));
    return std::max(loop, sums);
  }
  static __device__ __forceinline__ uint32_t* codes(int half) {
    return reinterpret_cast<uint32_t*>(shared_memory()) + half * kCodeWords;
  }
  static __device__ __forceinline__ S* operand(int half) {
    return reinterpret_cast<S*>(codes(2)) + half * kOperand;
  }
  // After the product: dlam sums per column of warps (WN, lines), dgam sums per row (WM, 16, N).
  static __device__ __forceinline__ C* dlam() { return reinterpret_cast<C*>(shared_memory()); }
  static __device__ __forceinline__ C* dgam() { return dlam() + Tile::WN * kLines; }
};

// Writes each warp's sums for dlam and dgam to shared memory. Each thread first sums over its own
// part of H. For dlam, the lanes that hold the same lines then add up their sums.
template <class Shared, class Tile, class S>
__device__ __forceinline__ void contract(const Tile& tile, const Contraction<S>& p, int64_t j0,
                                         int64_t i0, int64_t col0) {
  using C = typename Tile::C;
  constexpr int MI = Tile::MI, NI = Tile::NI;  // an mma tile has the 16 bases of one j
  static_assert(kQuad % MI == 0, "a warp's rank indices lie in one quad");
  const int j_warp = Tile::warp_m() * MI, g = threadIdx.x % 32 / 4;
  const DeltaShape& s = p.shape;
  const uint32_t* signs = p.signs + (j0 + j_warp) / kQuad * s.d;
  C lam[MI][2], dlam[MI][2] = {};
#pragma unroll
  for (int m = 0; m < MI; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t j = j0 + j_warp + m, i = i0 + g + 8 * h;
      lam[m][h] = j < s.r && i < s.n ? p.lam[j * s.n + i] : C(0);
    }
#pragma unroll
  for (int n = 0; n < NI; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int col = Tile::col(n, c);
      const int64_t k = col0 + col;
      const uint32_t sign = k < s.d ? signs[k] : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t i = i0 + g + 8 * h;
        const C gam = k < s.d && i < s.n ? p.gam[i * s.d + k] : C(0);
        C dgam = C(0);
#pragma unroll
        for (int m = 0; m < MI; ++m) {
          const int a = sign_of(sign, j_warp % kQuad + m);
          const C H = tile.warp.acc[m][n][2 * h + c];
          const C AH = a == 0 ? C(0) : a < 0 ? -H : H;
          if (a != 0) dlam[m][h] += gam * AH, dgam += lam[m][h] * AH;
        }
        Shared::dgam()[(Tile::warp_m() * kBases + g + 8 * h) * Tile::N + col] = dgam;
      }
    }
#pragma unroll
  for (int m = 0; m < MI; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      C sum = dlam[m][h];
      sum += __shfl_xor_sync(kWarp, sum, 1);
      sum += __shfl_xor_sync(kWarp, sum, 2);
      if (threadIdx.x % 4 == 0)
        Shared::dlam()[Tile::warp_n() * kLines + Tile::line(m, 2 * h)] = sum;
    }
}

template <class S, bool Tf32, bool Transposed>
__global__ void __launch_bounds__(kTileThreads, 1) delta_planes_backward_kernel(Contraction<S> p) {
  using Shared = ContractionMemory<S, Transposed>;
  using C = ComputeOf<S>;
  constexpr int N = kColumns<S>;
  constexpr Order kOrder = Transposed ? Order::by_line : Order::by_k;
  const DeltaShape& s = p.shape;
  const int64_t octets = s.octets(), steps = ceil_div(s.D, kSlots);
  const int64_t tile_index = blockIdx.x % (s.chunks() * octets);
  const int64_t col_block = blockIdx.x / (s.chunks() * octets), col0 = col_block * N;
  const int64_t octet = tile_index % octets, j0 = octet * kOctet;
  const int64_t i0 = tile_index / octets * kBases;
  const uint32_t* codes = p.codes + tile_index * steps * kTileWords;

  const auto load = [&](int64_t step, int half) {
    load_codes(Shared::codes(half), codes + step * kTileWords);
    if constexpr (Transposed)
      load_operand<Order::by_line, N, kSlots>(Shared::operand(half), Shared::kStride, p.grad, s.d,
                                              s.D, col0, step * kSlots, p.aligned);
    else
      load_operand<Order::by_k, kSlots, N>(Shared::operand(half), Shared::kStride, p.grad, s.D, s.d,
                                           step * kSlots, col0, p.aligned);
  };
  TernaryTile<S, N, Tf32> tile;
  pipeline<2>(static_cast<int>(steps), load, [&](int half) {
    tile.template step<kOrder>(Shared::codes(half), Shared::operand(half), Shared::kStride);
  });
  __syncthreads();
  contract<Shared>(tile, p, j0, i0, col0);
  __syncthreads();

  for (int at = threadIdx.x; at < kBases * N; at += kTileThreads) {
    const int64_t i = i0 + at / N, k = col0 + at % N;
    C sum = C(0);
#pragma unroll
    for (int w = 0; w < tile.WM; ++w) sum += Shared::dgam()[w * kBases * N + at];
    if (i < s.n && k < s.d) p.dgam[(octet * s.n + i) * s.d + k] = p.scale * sum;
  }
  const int64_t j = j0 + threadIdx.x / kBases, i = i0 + threadIdx.x % kBases;
  C sum = C(0);
#pragma unroll
  for (int w = 0; w < tile.WN; ++w) sum += Shared::dlam()[w * kLines + threadIdx.x];
  if (j < s.r && i < s.n) p.dlam[(col_block * s.r + j) * s.n + i] = p.scale * sum;
}

// out[e] = sum over parts of part[., e], in order.
template <class C>
__device__ __forceinline__ void add_parts(const C* part, int64_t parts, int64_t count, int64_t e,
                                          C* out) {
  C sum = C(0);
  for (int64_t b = 0; b < parts; ++b) sum += part[b * count + e];
  out[e] = sum;
}
template <class C>
__global__ void delta_gradients_kernel(const C* dlam_parts, int64_t col_blocks, int64_t lambdas,
                                       C* dlam, const C* dgam_parts, int64_t octets, int64_t gammas,
                                       C* dgam) {
  const int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (e < gammas)
    add_parts(dgam_parts, octets, gammas, e, dgam);
  else if (e < gammas + lambdas)
    add_parts(dlam_parts, col_blocks, lambdas, e - gammas, dlam);
}

}  // namespace

void delta_weight_backward(const DeltaWeightBackward& p, Device& device) {
  const Basis& b = p.basis;
  if (b.has_lists()) return delta_weight_backward_lists(p, device);
  with_engine(p.dtype, device.tf32, [&](auto storage, auto tf32) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr bool kTf32 = decltype(tf32)::value;
    const DeltaShape s(b);
    const int64_t col_blocks = ceil_div(s.d, kColumns<S>), lambdas = s.r * s.n, gammas = s.n * s.d;
    const Contraction<S> all{s,
                             column_codes(b, device),
                             signs_of_A(b, device),
                             static_cast<const C*>(p.lam),
                             static_cast<const C*>(p.gam),
                             static_cast<const S*>(p.grad),
                             aligned_rows(p.transposed ? s.D : s.d, kPerAccess<S>, p.grad),
                             static_cast<C>(p.scale / 2),  // codes stand for doubled numbers
                             scratch<C>(device, col_blocks * lambdas),
                             scratch<C>(device, s.octets() * gammas)};
    const auto start = [&](auto kernel, int64_t shared) {
      launch(device, "delta_planes_backward", kernel, s.chunks() * s.octets() * col_blocks,
             kTileThreads, shared, all);
    };
    p.transposed
        ? start(delta_planes_backward_kernel<S, kTf32, true>, ContractionMemory<S, true>::bytes())
        : start(delta_planes_backward_kernel<S, kTf32, false>,
                ContractionMemory<S, false>::bytes());
    launch(device, "delta_gradients", delta_gradients_kernel<C>, ceil_div(gammas + lambdas, 128),
           128, 0, all.dlam, col_blocks, lambdas, p.dlam, all.dgam, s.octets(), gammas, p.dgam);
  });
}

}  // namespace randlora::cuda
