// Searching the lines of sign-split lists (core/lists.h).
#pragma once
#include <cstdint>

#include "cuda_or_cpu.h"

namespace randlora::cuda {

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

// Tiles of `tile` entries of each line, numbered so that finding the line of a tile needs no sum.
// There are most_tiles of them; some are empty.
inline int64_t most_tiles(int64_t count, int64_t lines, int tile) { return count / tile + lines; }
__device__ __forceinline__ int64_t first_tile(const int64_t* offset, int64_t line, int tile) {
  return offset[2 * line] / tile + line;
}
// The line of a tile; all lanes of the warp search together, 32 steps at a time.
__device__ __forceinline__ int64_t line_of_tile(const int64_t* offset, int64_t lines,
                                                int64_t number, int tile) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, count = lines;
  while (count > 1) {
    const int64_t step = (count + 31) / 32, mine = low + lane * step;
    const bool starts = lane * step < count && first_tile(offset, mine, tile) <= number;
    const int last = __popc(__ballot_sync(kWarp, starts)) - 1;  // lane 0 always does
    low += last * step;
    count = min(step, count - last * step);
  }
  return low;
}

}  // namespace randlora::cuda
