// Tables of the support S_j = {k : A[j, k] != 0} of every rank index j. They depend only on the
// basis: made once and kept with the packed basis, or made in every call if it has none.
#pragma once
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora {
namespace cuda {

constexpr int kGroup = kSupportGroup;  // the entries of a rank index are padded to whole groups

struct Support {
  const int64_t*
      offset;  // (2 r + 1), that of A's lists: j has entries offset[2 j] .. offset[2 j + 2)
  int64_t r, n, d;
  int64_t bases;         // n padded to whole pieces of 16 bytes
  int64_t count;         // number of entries
  const int32_t* entry;  // (room), ascending by column: 2 k, plus 1 if A is -1; padding is -1
  const int32_t* at;  // (r, d): 2 p, plus 1 if A is -1, for the p-th entry of j; without an entry
                      // at column k, -1 - before(j, k)

  // Entries of j begin at first(j), which leaves room for whole groups without summing over smaller
  // j.
  __host__ __device__ int64_t room() const { return support_room(count, r); }
  __device__ __forceinline__ int64_t first(int64_t j) const {
    return (offset[2 * j] / kGroup + j) * kGroup;
  }
  __device__ __forceinline__ int64_t size(int64_t j) const {
    return offset[2 * j + 2] - offset[2 * j];
  }
  // How many entries of j lie before column k.
  __device__ __forceinline__ int before(int64_t j, int64_t k) const {
    if (k >= d) return static_cast<int>(size(j));
    const int32_t code = at[j * d + k];
    return code < 0 ? -1 - code : code / 2;
  }

  // Tiles of `tile` entries (a multiple of kGroup), numbered so that finding the j of a tile needs
  // no sum either. There are `tiles` of them; some are empty.
  int64_t tiles(int tile) const { return count / tile + r; }
  __device__ __forceinline__ int64_t first_tile(int64_t j, int tile) const {
    return offset[2 * j] / tile + j;
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
