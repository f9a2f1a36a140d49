// The transpose of a gradient, only for columns that A uses (delta_lists_backward.cu): 39 percent
// of them at density 1/64 and r = 32.
#pragma once
#include <algorithm>

#include "../device/launch.h"
#include "../device/list_blocks.h"

namespace randlora {
namespace cuda {
namespace {

constexpr int kSide = 64;  // of a tile
constexpr int kTiles = 4;  // tiles per block, one below the other
template <class S>         // between rows of a tile; odd in 32-bit words
constexpr int kTileStride = kSide + (sizeof(S) == 2 ? 2 : 1);

// Bit b: column k0 + b is in some S_j. Every warp computes it, a lane per rank index.
template <class Index>
__device__ uint64_t used_columns(const Lists<Index>& a, int64_t r, int64_t k0) {
  uint64_t used = 0;
  for (int64_t j = threadIdx.x % 32; j < r; j += 32) {
    const int64_t run[3] = {a.plus(j), a.minus(j), a.end(j)};
#pragma unroll
    for (int s = 0; s < 2; ++s)
      for (int64_t x = lower_bound(a.index, run[s], run[s + 1], k0);
           x < run[s + 1] && a.index[x] < k0 + kSide; ++x)
        used |= uint64_t{1} << (a.index[x] - k0);
  }
#pragma unroll
  for (int step = 16; step != 0; step /= 2) used |= __shfl_xor_sync(kWarp, used, step);
  return used;
}

// out (d, D): rows k that are used.
template <class S, class Index>
__global__ void transpose_kernel(const S* in, int64_t D, int64_t d, Lists<Index> a, int64_t r,
                                 int64_t across, bool aligned, S* out) {
  constexpr int N = 16 / int(sizeof(S)), kStride = kTileStride<S>;
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kSide columns, kStride)
  const int64_t k0 = blockIdx.x % across * kSide;
  const int cols = static_cast<int>(min(d - k0, int64_t{kSide}));
  const uint64_t used = used_columns(a, r, k0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 0; step < kTiles; ++step) {
    const int64_t o0 = (blockIdx.x / across * kTiles + step) * kSide;
    if (o0 >= D) break;
    const int rows = static_cast<int>(min(D - o0, int64_t{kSide}));
    if (aligned) {
      for (int e = threadIdx.x; e < kSide * kSide / N; e += blockDim.x) {
        const int row = e / (kSide / N), k = e % (kSide / N) * N;
        if (row >= rows || k >= cols) continue;
        const uint4 words = *reinterpret_cast<const uint4*>(in + (o0 + row) * d + k0 + k);
        S v[N];
        memcpy(v, &words, 16);
#pragma unroll
        for (int u = 0; u < N; ++u) tile[(k + u) * kStride + row] = v[u];
      }
    } else {
      for (int e = threadIdx.x; e < kSide * kSide; e += blockDim.x) {
        const int row = e / kSide, k = e % kSide;
        if (row < rows && k < cols) tile[k * kStride + row] = in[(o0 + row) * d + k0 + k];
      }
    }
    __syncthreads();
    for (int k = warp; k < cols; k += warps)
      if (used >> k & 1)
        for (int row = lane; row < rows; row += 32)
          out[(k0 + k) * D + o0 + row] = tile[k * kStride + row];
    __syncthreads();
  }
}

// Transposes `in` from (D, d) to (d, D). If no S_j contains column k, row k of the result is unset.
template <class S, class Index>
const S* transpose_used(const S* in, int64_t D, int64_t d, const Lists<Index>& a, int64_t r,
                        Device& device) {
  S* out = scratch<S>(device, D * d);
  const int64_t across = ceil_div(d, kSide), down = ceil_div(D, kSide * kTiles);
  const bool aligned = reinterpret_cast<uintptr_t>(in) % 16 == 0 && d * sizeof(S) % 16 == 0;
  launch(device, "delta_weight_transpose", transpose_kernel<S, Index>,
         static_cast<unsigned>(across * down), std::min(device.max_threads, 256),
         kSide * kTileStride<S> * int64_t{sizeof(S)}, in, D, d, a, r, across, aligned, out);
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace randlora
