// Dense forms of a ternary matrix, as csrc/cpu/packing.cpp makes and reads them.
//
//   planes_to_dense, lists_to_dense   out (rows, cols) = value * ternary element, in any dtype
//   pack_dense                        planes of a matrix with elements -a, 0, +a only; a is the
//                                     magnitude of its first element that is not zero
//
// Blocks take rows; threads take 16 bytes of a row each. Lists are written over zeros: the second,
// scattered write of the few non-zero elements finds its row in L2. To pack, a warp makes a word of
// both planes with two loads and six ballots for 64 elements.
//
// Floor: the dense matrix is written once (expansion) or read once (packing).
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

// ---- expansion ----------------------------------------------------------------------------------

template <class S, bool Aligned>
__global__ void planes_to_dense_kernel(Planes p, int64_t rows, int64_t cols, double value, S* out) {
  using C = ComputeOf<S>;
  constexpr int V = kPerAccess<S>;
  const S plus = narrow<S>(static_cast<C>(value)), minus = narrow<S>(static_cast<C>(-value));
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t from = int64_t{blockIdx.y} * blockDim.x * V; from < cols;
         from += int64_t{gridDim.y} * blockDim.x * V) {
      const Columns<V, Aligned> c(from, threadIdx.x, cols);
      const uint32_t is_plus = c.bits(p.plus + row * p.words);
      const uint32_t is_minus = c.bits(p.minus + row * p.words);
      Pack<S, V> x = {};
#pragma unroll
      for (int v = 0; v < V; ++v)
        x.set(v, is_plus >> v & 1 ? plus : is_minus >> v & 1 ? minus : S{});
      c.store(out + row * cols, x);
    }
}

template <class S, class Index, bool Aligned>
__global__ void lists_to_dense_kernel(Lists<Index> lists, int64_t rows, int64_t cols, double value,
                                      S* out) {
  using C = ComputeOf<S>;
  constexpr int V = kPerAccess<S>;
  const S plus = narrow<S>(static_cast<C>(value)), minus = narrow<S>(static_cast<C>(-value));
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    S* to = out + row * cols;
    for (int64_t from = 0; from < cols; from += blockDim.x * V)
      Columns<V, Aligned>(from, threadIdx.x, cols).store(to, Pack<S, V>{});
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

// ---- packing ------------------------------------------------------------------------------------

// One block suffices: the first non-zero element of a real basis is never far. Only an all-zero
// matrix is read whole.
template <class S>
__global__ void find_magnitude_kernel(const S* x, int64_t count, PackReport* report) {
  constexpr int kAhead = 8;
  auto* of_warp = reinterpret_cast<int64_t*>(shared_memory());
  int64_t first = count;
  for (int64_t from = 0; from < count && first == count; from += int64_t{blockDim.x} * kAhead) {
#pragma unroll
    for (int i = kAhead - 1; i >= 0; --i) {
      const int64_t e = from + i * int(blockDim.x) + threadIdx.x;
      if (e < count && widen(x[e]) != 0) first = e;  // true for NaN too
    }
#pragma unroll
    for (int step = 16; step != 0; step /= 2)
      first = min(first, __shfl_xor_sync(kWarp, first, step));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = first;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; ++w) first = min(first, of_warp[w]);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double value = first < count ? static_cast<double>(widen(x[first])) : 0.0;
  *report = {value < 0 ? -value : value, static_cast<uint64_t>(count)};
}

template <class S>
__global__ void pack_dense_kernel(const S* x, int64_t rows, int64_t cols, uint64_t* plus,
                                  uint64_t* minus, PackReport* report) {
  using C = ComputeOf<S>;
  const C a = static_cast<C>(report->a);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t words = words_of(cols);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t w = int64_t{blockIdx.y} * warps + threadIdx.x / 32; w < words;
         w += int64_t{gridDim.y} * warps) {
      uint64_t p = 0, m = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t first = w * 64 + half * 32, col = first + lane;
        const C v = col < cols ? widen(x[row * cols + col]) : C(0);
        const bool is_plus = v == a && a != 0, is_minus = v == -a && a != 0;
        p |= uint64_t{__ballot_sync(kWarp, is_plus)} << (32 * half);
        m |= uint64_t{__ballot_sync(kWarp, is_minus)} << (32 * half);
        const unsigned other = __ballot_sync(kWarp, !(is_plus || is_minus || v == 0));
        if (other != 0 && lane == 0)  // the minimum, in any order of warps
          atomicMin(reinterpret_cast<unsigned long long*>(&report->bad),
                    static_cast<unsigned long long>(row * cols + first + __ffs(other) - 1));
      }
      if (lane == 0) plus[row * words + w] = p, minus[row * words + w] = m;
    }
}

}  // namespace

void planes_to_dense(const PlanesToDense& p, Device& device) {
  with_dtype(p.dtype, [&](auto tag) {
    using S = decltype(tag);
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
  with_dtype(p.dtype, [&](auto tag) {
    p.lists.typed([&](auto lists) {
      using S = decltype(tag);
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

void pack_dense(const PackDense& p, Device& device) {
  const int64_t threads = device.max_threads, warps = threads / 32;
  with_dtype(p.dtype, [&](auto tag) {
    launch(device, "find_magnitude", find_magnitude_kernel<decltype(tag)>, 1, threads,
           warps * int64_t{sizeof(int64_t)}, p.dense, p.rows * p.cols, p.report);
    constexpr int kWords = 4;  // about this many per warp
    launch(device, "pack_dense", pack_dense_kernel<decltype(tag)>,
           grid_of_rows(p.rows, ceil_div(words_of(p.cols), warps * kWords)), threads, 0, p.dense,
           p.rows, p.cols, p.plus, p.minus, p.report);
  });
}

}  // namespace randlora::cuda
