// dlam and dgam from U and z (docs/math.md, section 4):
//
//   P[p, i]      = sum_t z[t, k_p] U[t, (j, i)]        p in S_j
//   dlam[j, i]   = scale sum_p G[p, i] P[p, i]
//   dgam[i, k]   = scale sum_{j : A[j, k] != 0} A[j, k] lam[j, i] P[p, i]
//
//   grad_kernel      P, a dense product with gathered rows of the token panels of z as in a_up.cu.
//                    A block owns 128 entries of one j, a tile of copies and some tokens. If that
//                    makes too few blocks, the tokens are split and every split writes its own P.
//   contract_kernel  a lane has a column k, a warp 32 columns and 8 copies. It walks j in ascending
//                    order and adds up the splits. dgam stays in registers. Its share of
//                    dlam[j, :] is summed over the lanes and written to scratch, one row for every
//                    32 columns
//   sum_lambda       adds those rows up
// Sums that span blocks go through scratch in a fixed order: deterministic.
//
// Floor: U and z read once; 2 T n nnz(A) operations.
#include "a_side.h"

namespace randlora::cuda {
namespace {

template <class S, int MI, int NI>
struct Grad : BlockTile<S, MI, NI> {
  using Shape = BlockTile<S, MI, NI>;
  static constexpr int kUStride = Shape::kN + Shape::kPad;
  static constexpr int kStage =
      Shape::kM * Shape::kLineStride + Shape::kDepth * kUStride;  // elements
  static constexpr int64_t kStageBytes = Shape::kStages * kStage * int64_t{sizeof(S)};
  static constexpr int64_t kShared =
      kStageBytes > Shape::kStoreBytes ? kStageBytes : Shape::kStoreBytes;
};

template <class S, int MI, int NI>
__global__ void __launch_bounds__(128)
    grad_kernel(Support a, const S* __restrict__ panels, int width, const S* __restrict__ U,
                int64_t T, int64_t split, bool aligned, bool accumulate,
                ComputeOf<S>* __restrict__ P) {
  using Shape = Grad<S, MI, NI>;
  using C = typename Shape::C;
  using Tile = typename Shape::Tile;
  constexpr int kWidth = kPerAccess<S>, kZPieces = Shape::kDepth / kWidth,
                kUPieces = Shape::kN / kWidth;
  constexpr int kRows = Shape::kM * kZPieces / Shape::kThreads;  // rows of z that a thread copies
  S* shared = reinterpret_cast<S*>(shared_memory());

  const int64_t copy_tiles = ceil_div(a.n, Shape::kN);
  const int64_t i0 = blockIdx.x % copy_tiles * Shape::kN, number = blockIdx.x / copy_tiles;
  const int64_t j = line_of_tile(a.offset, a.r, number, Shape::kM);
  const int64_t p0 = (number - first_tile(a.offset, j, Shape::kM)) * Shape::kM,
                entries = a.size(j) - p0;
  if (entries <= 0) return;
  const int64_t e0 = a.first(j) + p0;
  const int64_t t0 = blockIdx.y * split, t1 = min(T, t0 + split);
  const int steps = static_cast<int>(ceil_div(t1 - t0, Shape::kDepth));

  const S* row_of[kRows];  // null past the last entry
  each_piece<Shape::kM, kZPieces, Shape::kThreads>([&](int row, int piece, int u) {
    row_of[u] =
        row < entries ? panels + int64_t{a.entry[e0 + row] / 2} * width + piece * kWidth : nullptr;
  });
  const auto load = [&](int step, int stage) {
    S* z_stage = shared + stage * Shape::kStage;
    S* u_stage = z_stage + Shape::kM * Shape::kLineStride;
    const int64_t t = t0 + step * Shape::kDepth;
    const int64_t panel = t / width * a.d * width + t % width;
    each_piece<Shape::kM, kZPieces, Shape::kThreads>([&](int row, int piece, int u) {
      cp_async16(z_stage + row * Shape::kLineStride + piece * kWidth,
                 row_of[u] ? row_of[u] + panel : panels, row_of[u] ? 16 : 0);
    });
    // Tokens past T are zero in the panels and must be zero here too: 0 * NaN is NaN.
    const S* from = U + t * a.r * a.n + j * a.n + i0;
    if (aligned) {
      each_piece<Shape::kDepth, kUPieces, Shape::kThreads>([&](int row, int piece, int) {
        const bool there = t + row < T && i0 + piece * kWidth < a.n;
        cp_async16(u_stage + row * Shape::kUStride + piece * kWidth,
                   there ? from + row * a.r * a.n + piece * kWidth : U, there ? 16 : 0);
      });
    } else {
      for (int x = threadIdx.x; x < Shape::kDepth * Shape::kN; x += Shape::kThreads) {
        const int row = x / Shape::kN, i = x % Shape::kN;
        u_stage[row * Shape::kUStride + i] =
            t + row < T && i0 + i < a.n ? from[row * a.r * a.n + i] : S{};
      }
    }
  };

  Tile tile;
  const int wm = Shape::warp_m(), wn = Shape::warp_n();
  const bool works = wm < entries && i0 + wn < a.n;
  pipeline<Shape::kStages>(steps, load, [&](int stage) {
    const S* z_stage = shared + stage * Shape::kStage + wm * Shape::kLineStride;
    const S* u_stage = shared + stage * Shape::kStage + Shape::kM * Shape::kLineStride + wn;
    if (works)
#pragma unroll
      for (int k = 0; k < Shape::kDepth; k += Tile::kStep)
        tile.template step<Order::by_line, Order::by_k>(
            z_stage + k, Shape::kLineStride, u_stage + k * Shape::kUStride, Shape::kUStride);
  });
  __syncthreads();  // store_rows reuses the stages' memory
  if (works)
    store_rows(tile, reinterpret_cast<C*>(shared) + threadIdx.x / 32 * 16 * Shape::kStoreStride,
               P + (blockIdx.y * a.room() + e0 + wm) * a.copies + i0 + wn, a.copies, entries - wm,
               a.copies - i0 - wn, true, accumulate);
}

constexpr int kCopies = 8;  // per warp of contract_kernel

template <class C>
__global__ void contract_kernel(Support a, const C* __restrict__ P, int splits,
                                const C* __restrict__ lam, const C* __restrict__ gam, C scale,
                                C* __restrict__ dgam, bool accumulate, C* __restrict__ partial) {
  const int lane = threadIdx.x % 32;
  const int64_t chunks = a.copies / kCopies;
  const int64_t warp = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int64_t columns = warp / chunks, i0 = warp % chunks * kCopies;
  const int64_t k = columns * 32 + lane;
  if (columns * 32 >= a.d) return;
  const int64_t split_stride = a.room() * a.copies;

  C gamma[kCopies], sum[kCopies];
#pragma unroll
  for (int u = 0; u < kCopies; ++u) {
    gamma[u] = k < a.d && i0 + u < a.n ? gam[(i0 + u) * a.d + k] : C(0);
    sum[u] = 0;
  }
  // Codes are loaded four rank indices ahead, and lambda before anything depends on the code.
  constexpr int kAhead = 4;
  int32_t ahead[kAhead];
  const auto fetch = [&](int64_t j) { return k < a.d && j < a.r ? a.at[j * a.d + k] : -1; };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) ahead[u] = fetch(u);
  for (int64_t j = 0; j < a.r; ++j) {
    const int32_t code = ahead[0];
#pragma unroll
    for (int u = 0; u + 1 < kAhead; ++u) ahead[u] = ahead[u + 1];
    ahead[kAhead - 1] = fetch(j + kAhead);
    C lambda[kCopies];
#pragma unroll
    for (int u = 0; u < kCopies; ++u) lambda[u] = lam[j * a.n + min(i0 + u, a.n - 1)];
#pragma unroll
    for (int u = 0; u < kCopies; ++u) pin(lambda[u]);
    C part[kCopies] = {};
    if (code >= 0) {
      const C* row = P + (a.first(j) + code / 2) * a.copies + i0;
      const C sign = code & 1 ? -scale : scale;
      C signed_P[kCopies] = {};
      for (int s = 0; s < splits; ++s, row += split_stride) {
        C of_split[kCopies];
        load_run<kCopies>(row, of_split);
#pragma unroll
        for (int u = 0; u < kCopies; ++u) signed_P[u] += of_split[u];
      }
#pragma unroll
      for (int u = 0; u < kCopies; ++u) {
        const C v = sign * signed_P[u];
        sum[u] += v * lambda[u];
        part[u] = v * gamma[u];
      }
    }
    if (!__any_sync(kWarp, code >= 0)) {  // at low density, most of the time
      if (lane < kCopies) partial[(columns * a.r + j) * a.copies + i0 + lane] = 0;
      continue;
    }
    const C total = warp_sums<kCopies>(part);
    if (lane % (32 / kCopies) == 0)
      partial[(columns * a.r + j) * a.copies + i0 + lane / (32 / kCopies)] = total;
  }
#pragma unroll
  for (int u = 0; u < kCopies; ++u)
    if (k < a.d && i0 + u < a.n) {
      C* to = dgam + (i0 + u) * a.d + k;
      *to = accumulate ? *to + sum[u] : sum[u];
    }
}

// dlam[j, i] (+)= sum of `rows` rows (r, copies) of `partial`; a block takes 32 elements.
template <class C>
__global__ void sum_lambda(Support a, const C* __restrict__ partial, int64_t rows,
                           C* __restrict__ dlam, bool accumulate) {
  const int64_t chunks = ceil_div(a.n, 32), j = blockIdx.x / chunks;
  const int64_t i = blockIdx.x % chunks * 32 + threadIdx.x % 32;
  const C sum = block_sum(i < a.n ? partial + j * a.copies + i : nullptr, rows, a.r * a.copies,
                          reinterpret_cast<C*>(shared_memory()));
  if (threadIdx.x >= 32 || i >= a.n) return;
  C* to = dlam + j * a.n + i;
  *to = accumulate ? *to + sum : sum;
}

}  // namespace

void ASideCall::grad(const void* U, void* dlam, void* dgam, bool accumulate) {
  const Support& a = support();
  int64_t splits = 0;
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    const auto start = [&](auto kernel, auto shape) {
      using Shape = decltype(shape);
      const int64_t tiles = most_tiles(a.count, a.r, Shape::kM) * ceil_div(a.n, Shape::kN);
      // Enough splits for two blocks per SM, but of at least 256 tokens: a shorter split would not
      // pay for its P. Each part of the tokens adds to the P of earlier parts, split by split.
      const int64_t tokens = max(part_, int64_t{1});
      int64_t wanted = ceil_div(2 * device_.multiprocessors, tiles);
      // In fp32 a running sum over thousands of tokens would be less accurate than torch's. So use
      // as many splits as a chunk of scratch holds.
      if (sizeof(S) == 4) {
        const int64_t bytes = a.room() * a.copies * int64_t{sizeof(C)};
        wanted = max(wanted, device_.chunk_bytes / bytes);
      }
      const int64_t most = min(ceil_div(tokens, 256), wanted);
      const int64_t split = ceil_div(ceil_div(tokens, most), 64) * 64;
      if (!partial_) partial_ = scratch<C>(device_, most * a.room() * a.copies);
      splits = ceil_div(min(part_, T_), split);
      for (int64_t t = 0; t < T_; t += part_) {
        const Panels& z = panels(t);
        const int64_t T = min(part_, T_ - t);
        launch(device_, "a_grad", kernel, {tiles, ceil_div(T, split)}, Shape::kThreads,
               Shape::kShared, a, z.data, z.width, static_cast<const S*>(U) + t * a.r * a.n, T,
               split, aligned_rows(a.n, kPerAccess<S>, U), t > 0, partial_);
      }
    };
    if constexpr (sizeof(S) == 8) {
      start(grad_kernel<S, 1, 4>, Grad<S, 1, 4>{});
    } else {
      static_assert(Grad<S, 4, 8>::kShared <= kLeastShared, "on every card");
      a.n > 32 ? start(grad_kernel<S, 4, 8>, Grad<S, 4, 8>{})
               : start(grad_kernel<S, 4, 2>, Grad<S, 4, 2>{});
    }
  });
  const auto contract = [&](auto compute) {
    using C = decltype(compute);
    const int64_t columns = ceil_div(a.d, 32);
    if (!partial_lam_) partial_lam_ = scratch<C>(device_, columns * a.r * a.copies);
    const int threads = 128;
    launch(device_, "a_grad_contract", contract_kernel<C>,
           ceil_div(columns * (a.copies / kCopies), threads / 32), threads, 0, a, partial_, splits,
           p_.lam, p_.gam, p_.scale, dgam, accumulate, partial_lam_);
    launch(device_, "a_grad_sum", sum_lambda<C>, a.r * ceil_div(a.n, 32), threads,
           threads * int64_t{sizeof(C)}, a, partial_lam_, columns, dlam, accumulate);
  };
  p_.dtype == DType::f64 ? contract(double{}) : contract(float{});
}

}  // namespace randlora::cuda
