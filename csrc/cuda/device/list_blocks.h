// Lines of sign-split lists (core/lists.h) regrouped by blocks of `step` positions: block after
// block, and within a block the +1 before the -1. A kernel then walks one run per block instead of
// two.
#pragma once
#include "../../core/lists.h"
#include "cuda_or_cpu.h"

namespace randlora {
namespace cuda {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// The first x in [begin, end) with index[x] >= bound, or end.
template <class Index>
__device__ __forceinline__ int64_t lower_bound(const Index* index, int64_t begin, int64_t end,
                                               int64_t bound) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (index[middle] < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <class Index>
struct ListBlocks {
  Lists<Index> lists;
  int64_t step;

  // How many entries of line q lie in blocks before `block`.
  __device__ __forceinline__ int64_t before(int64_t q, int64_t block) const {
    const int64_t plus = lists.plus(q), minus = lists.minus(q), bound = block * step;
    return lower_bound(lists.index, plus, minus, bound) - plus +
           lower_bound(lists.index, minus, lists.end(q), bound) - minus;
  }

  // The place of entry x in line q after regrouping.
  __device__ __forceinline__ int64_t place(int64_t q, int64_t x) const {
    const int64_t plus = lists.plus(q), minus = lists.minus(q);
    const int64_t block = static_cast<uint32_t>(lists.index[x]) / static_cast<uint32_t>(step);
    if (x < minus)
      return x - plus + lower_bound(lists.index, minus, lists.end(q), block * step) - minus;
    return x - minus + lower_bound(lists.index, plus, minus, (block + 1) * step) - plus;
  }
};

}  // namespace cuda
}  // namespace randlora
