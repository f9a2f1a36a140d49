// Products of the factored path whose non-zeros lie, for a rank index j, at the same features S_j for
// all n bases, as those of A, which is one matrix for all of them. Each is a dense product with
// gathered features:
//
//   up     V[t, (j, i)]      = factor[j, i] sum_{p in S_j} value[p, i] z[t, k_p]    a_up.cu
//   down   out[t, k_p]      += sum_i value[p, i] U[t, (j, i)]                       a_down.cu
//
// where p is an entry, k_p its feature of d.
#pragma once
#include "launch.h"
#include "panels.h"

namespace randlora {
namespace cuda {

constexpr int kGroup = 32;  // the entries of a rank index are padded to whole groups

// The entries, ascending by feature, rank index after rank index.
struct Support {
  const int64_t* offset;  // (r + 1): where those of rank index j begin
  int64_t r, n, d;
  int64_t bases;   // n padded to whole pieces of 16 bytes
  int64_t count;   // of entries
  int32_t* entry;  // (room): 2 k, and 1 more for a -1 of A; -1 where it pads
  int32_t* at;     // (r, d): 2 p, and 1 more for a -1 of A, for the p-th entry of j; where there is
                   // none at feature k, -1 - (how many entries of j lie before k)

  // Entries of j begin at first(j). That leaves room for whole groups without a sum over the j before.
  __host__ __device__ int64_t room() const { return (count / kGroup + r) * kGroup; }
  __device__ __forceinline__ int64_t first(int64_t j) const {
    return (offset[j] / kGroup + j) * kGroup;
  }
  __device__ __forceinline__ int64_t size(int64_t j) const { return offset[j + 1] - offset[j]; }
  // How many entries of j lie before feature k.
  __device__ __forceinline__ int before(int64_t j, int64_t k) const {
    if (k >= d) return static_cast<int>(size(j));
    const int32_t code = at[j * d + k];
    return code < 0 ? -1 - code : code / 2;
  }

  // Tiles of `tile` entries (a multiple of kGroup), numbered so that the number of a tile tells its j
  // without a sum, too. `tiles` of them, some of which are empty.
  int64_t tiles(int tile) const { return count / tile + r; }
  __device__ __forceinline__ int64_t first_tile(int64_t j, int tile) const {
    return offset[j] / tile + j;
  }
  // The j of a tile; all lanes of the warp search together, 32 steps at a time.
  __device__ __forceinline__ int64_t rank_of_tile(int64_t number, int tile) const {
    const int lane = threadIdx.x % 32;
    int64_t low = 0, count = r;
    while (count > 1) {
      const int64_t step = ceil_div(count, 32), mine = low + lane * step;
      const bool starts = lane * step < count && first_tile(mine, tile) <= number;
      const int last = __popc(__ballot_sync(0xffffffffu, starts)) - 1;  // lane 0 always does
      low += last * step;
      count = min(step, count - last * step);
    }
    return low;
  }
};

}  // namespace cuda
}  // namespace randlora
