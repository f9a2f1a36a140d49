// planes_to_dense, lists_to_dense: out (rows, cols) = value * ternary element, in any dtype, as
// csrc/cpu/packing.cpp makes it.
//
// Blocks take rows; threads take 16 bytes of a row each. Lists are written over zeros: the second,
// scattered write of the few non-zero elements finds its row in L2.
//
// Floor: the dense matrix is written once.
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned>
__global__ void planes_to_dense_kernel(Planes p, int64_t rows, int64_t cols, double value, S* out) {
  using C = ComputeOf<S>;
  constexpr int kWidth = kPerAccess<S>;
  const S plus = narrow<S>(static_cast<C>(value)), minus = narrow<S>(static_cast<C>(-value));
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t from = int64_t{blockIdx.y} * blockDim.x * kWidth; from < cols;
         from += int64_t{gridDim.y} * blockDim.x * kWidth) {
      const Columns<kWidth, Aligned> c(from, threadIdx.x, cols);
      const uint32_t is_plus = c.bits(p.plus + row * p.words);
      const uint32_t is_minus = c.bits(p.minus + row * p.words);
      Pack<S, kWidth> x = {};
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
        x.set(v, is_plus >> v & 1 ? plus : is_minus >> v & 1 ? minus : S{});
      c.store(out + row * cols, x);
    }
}

template <class S, class Index, bool Aligned>
__global__ void lists_to_dense_kernel(Lists<Index> lists, int64_t rows, int64_t cols, double value,
                                      S* out) {
  using C = ComputeOf<S>;
  constexpr int kWidth = kPerAccess<S>;
  const S plus = narrow<S>(static_cast<C>(value)), minus = narrow<S>(static_cast<C>(-value));
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    S* to = out + row * cols;
    for (int64_t from = 0; from < cols; from += blockDim.x * kWidth)
      Columns<kWidth, Aligned>(from, threadIdx.x, cols).store(to, Pack<S, kWidth>{});
    __syncthreads();
    const int64_t turn = lists.minus(row), end = lists.end(row);
    for (int64_t e = lists.plus(row) + threadIdx.x; e < end; e += blockDim.x)
      to[lists.index[e]] = e < turn ? plus : minus;
  }
}

// Threads for a row: no more than have work.
int64_t threads_for(int64_t accesses, const Device& device) {
  return std::clamp<int64_t>(ceil_div(accesses, 32) * 32, 32, device.max_threads);
}

// A block per row (per few rows if a grid cannot hold them all), and `parts` blocks along it.
Grid grid_of_rows(int64_t rows, int64_t parts) {
  return {std::min<int64_t>(rows, 0x7fffffff), std::min<int64_t>(parts, 65535)};
}

}  // namespace

void planes_to_dense(const PlanesToDense& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t accesses = ceil_div(p.cols, kPerAccess<S>);
    const int64_t threads = threads_for(accesses, device);
    const auto kernel = aligned_rows(p.cols, kPerAccess<S>, p.out)
                            ? planes_to_dense_kernel<S, true>
                            : planes_to_dense_kernel<S, false>;
    launch(device, "planes_to_dense", kernel, grid_of_rows(p.rows, ceil_div(accesses, threads)),
           threads, 0, p.planes, p.rows, p.cols, p.value, p.out);
  });
}

void lists_to_dense(const ListsToDense& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    p.lists.typed([&](auto lists) {
      using S = decltype(storage);
      using Index = typename decltype(lists)::Index;
      const auto kernel = aligned_rows(p.cols, kPerAccess<S>, p.out)
                              ? lists_to_dense_kernel<S, Index, true>
                              : lists_to_dense_kernel<S, Index, false>;
      launch(device, "lists_to_dense", kernel, grid_of_rows(p.rows, p.cols > 0),
             threads_for(ceil_div(p.cols, kPerAccess<S>), device), 0, lists, p.rows, p.cols,
             p.value, p.out);
    });
  });
}

}  // namespace randlora::cuda
