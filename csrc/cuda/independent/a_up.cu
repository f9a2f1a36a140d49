// V (T, K) = scale * z (T, d) A'^T, one rank index at a time (a_side.h):
//
//   V[t, (j, i)] = scale lam[j, i] sum_{p in S_j} G[p, i] z[t, k_p]
//
// This is a dense product (tokens x |S_j|) (|S_j| x n) with a gathered left operand: rows k_p of
// the token panels of z, 128 bytes each. A block owns tokens x copies of one j. It fetches 32
// entries (16 unless in 16 bits) a stage by cp.async, three stages deep. Blocks that differ only in
// j are neighbours, so a panel comes from memory once and then from L2. Few tokens use smaller
// tiles, so that every SM has a block.
//
// Floor: V written and z read once; 2 T n nnz(A) operations.
#include "a_side.h"

namespace randlora::cuda {
namespace {

template <class S, int MI, int NI>
struct Up : BlockTile<S, MI, NI> {
  using Shape = BlockTile<S, MI, NI>;
  static constexpr int kZStride = Shape::kM + Shape::kPad, kValueStride = Shape::kN + Shape::kPad;
  static constexpr int kStage = Shape::kDepth * (kZStride + kValueStride);  // elements
  static constexpr int64_t kStageBytes = Shape::kStages * kStage * int64_t{sizeof(S)};
  static constexpr int64_t kShared =
      kStageBytes > Shape::kStoreBytes ? kStageBytes : Shape::kStoreBytes;
};

template <class S, int MI, int NI>
__global__ void __launch_bounds__(128)
    up_kernel(Support a, const S* __restrict__ values, const S* __restrict__ panels, int width,
              int64_t T, const ComputeOf<S>* __restrict__ lam, ComputeOf<S> scale,
              S* __restrict__ V, bool aligned) {
  using Shape = Up<S, MI, NI>;
  using C = typename Shape::C;
  using Tile = typename Shape::Tile;
  constexpr int kWidth = kPerAccess<S>, kZPieces = Shape::kM / kWidth,
                kValuePieces = Shape::kN / kWidth;
  constexpr int kCopies = Shape::kDepth * kZPieces / Shape::kThreads;
  S* shared = reinterpret_cast<S*>(shared_memory());

  const int64_t base_tiles = ceil_div(a.n, Shape::kN);
  int64_t block = blockIdx.x;
  const int64_t i0 = block % base_tiles * Shape::kN;
  block /= base_tiles;
  const int64_t j = block % a.r, t0 = block / a.r * Shape::kM;
  const int64_t first = a.first(j);
  const int steps = static_cast<int>(ceil_div(a.size(j), Shape::kDepth));

  // A thread always moves the same tokens of z and the same copies of the values.
  const int64_t t = t0 + threadIdx.x % kZPieces * kWidth,
                i = i0 + threadIdx.x % kValuePieces * kWidth;
  const bool has_tokens = t < T, has_copies = i < a.copies;
  const S* z = panels + (t / width * a.d * width + t % width);
  const int32_t* entry = a.entry + first;
  const S* value = values + first * a.copies + i;

  int32_t code[kCopies];  // for the next load, fetched one step ahead
  const auto fetch = [&](int step) {
    each_piece<Shape::kDepth, kZPieces, Shape::kThreads>([&](int row, int, int u) {
      code[u] = step < steps ? entry[step * Shape::kDepth + row] : -1;
    });
  };
  const auto load = [&](int step, int stage) {
    S* z_stage = shared + stage * Shape::kStage;
    S* v_stage = z_stage + Shape::kDepth * Shape::kZStride;
    each_piece<Shape::kDepth, kZPieces, Shape::kThreads>([&](int row, int piece, int u) {
      const bool there = has_tokens && code[u] >= 0;
      cp_async16(z_stage + row * Shape::kZStride + piece * kWidth,
                 there ? z + int64_t{code[u] / 2} * width : panels, there ? 16 : 0);
    });
    each_piece<Shape::kDepth, kValuePieces, Shape::kThreads>([&](int row, int piece, int) {
      cp_async16(v_stage + row * Shape::kValueStride + piece * kWidth,
                 has_copies ? value + (step * Shape::kDepth + row) * a.copies : values,
                 has_copies ? 16 : 0);
    });
    fetch(step + 1);
  };

  Tile tile;
  const int wm = Shape::warp_m(), wn = Shape::warp_n();
  const bool works = i0 + wn < a.n;
  fetch(0);
  pipeline<Shape::kStages>(steps, load, [&](int stage) {
    const S* z_stage = shared + stage * Shape::kStage + wm;
    const S* v_stage = shared + stage * Shape::kStage + Shape::kDepth * Shape::kZStride + wn;
    if (works)
#pragma unroll
      for (int k = 0; k < Shape::kDepth; k += Tile::kStep)
        tile.template step<Order::by_k, Order::by_k>(z_stage + k * Shape::kZStride, Shape::kZStride,
                                                     v_stage + k * Shape::kValueStride,
                                                     Shape::kValueStride);
  });

#pragma unroll
  for (int n = 0; n < NI; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t c = i0 + wn + Tile::col(n, h);
      C factor = scale;
      if (c < a.n) factor *= lam[j * a.n + c];
#pragma unroll
      for (int m = 0; m < MI; ++m) tile.acc[m][n][h] *= factor, tile.acc[m][n][2 + h] *= factor;
    }
  __syncthreads();  // store_rows reuses the stages' memory
  if (works)
    store_rows(tile, reinterpret_cast<C*>(shared) + threadIdx.x / 32 * 16 * Shape::kStoreStride,
               V + (t0 + wm) * a.r * a.n + j * a.n + i0 + wn, a.r * a.n, T - t0 - wm, a.n - i0 - wn,
               aligned, false);
}

}  // namespace

void ASideCall::up(void* V) {
  if (T_ == 0) return;
  const Support& a = support();
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto start = [&](auto kernel, auto shape) {
      using Shape = decltype(shape);
      for (int64_t t = 0; t < T_; t += part_) {
        const int64_t T = min(part_, T_ - t);
        const Panels& z = panels(t);
        S* to = static_cast<S*>(V) + t * a.r * a.n;
        const int64_t blocks = ceil_div(T, Shape::kM) * a.r * ceil_div(a.n, Shape::kN);
        launch(device_, "a_up", kernel, blocks, Shape::kThreads, Shape::kShared, a, values(false),
               z.data, z.width, T, p_.lam, p_.scale, to, aligned_rows(a.n, kPerAccess<S>, to));
      }
    };
    if constexpr (sizeof(S) < 8) {
      using Wide = Up<S, 4, 8>;
      static_assert(Wide::kShared <= kLeastShared, "on every card");
      const int64_t wide = ceil_div(min(part_, T_), Wide::kM) * a.r * ceil_div(a.n, Wide::kN);
      if (2 * wide >= device_.multiprocessors)
        return a.n > 32 ? start(up_kernel<S, 4, 8>, Wide{})
                        : start(up_kernel<S, 4, 2>, Up<S, 4, 2>{});
    }
    start(up_kernel<S, 1, 4>, Up<S, 1, 4>{});
  });
}

}  // namespace randlora::cuda
