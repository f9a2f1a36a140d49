// planes_to_dense: out (rows, cols) = value * ternary element, in any dtype, as
// csrc/cpu/packing.cpp makes it.
//
// A block takes rows, or parts of them; its threads take 16 bytes of a row each.
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

}  // namespace

void planes_to_dense(const PlanesToDense& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t accesses = ceil_div(p.cols, kPerAccess<S>);
    // No more threads than have work, and no more blocks than a grid can hold.
    const int64_t threads =
        std::clamp<int64_t>(ceil_div(accesses, 32) * 32, 32, device.max_threads);
    const Grid grid(std::min<int64_t>(p.rows, 0x7fffffff),
                    std::min<int64_t>(ceil_div(accesses, threads), 65535));
    const auto kernel = aligned_rows(p.cols, kPerAccess<S>, p.out)
                            ? planes_to_dense_kernel<S, true>
                            : planes_to_dense_kernel<S, false>;
    launch(device, "planes_to_dense", kernel, grid, threads, 0, p.planes, p.rows, p.cols, p.value,
           p.out);
  });
}

}  // namespace randlora::cuda
