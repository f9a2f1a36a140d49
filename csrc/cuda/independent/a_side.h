// Independent bases, what the products of the A side share. All n copies of row j of A (rank index
// j) have one support, S_j = {k : A[j, k] != 0}. Each product is then a dense one with gathered
// features:
//
//   up     V[t, (j, i)]      = scale lam[j, i] sum_{p in S_j} G[p, i] z[t, k_p]      a_up.cu
//   down   out[t, k_p]      += sum_i (scale lam[j, i] G[p, i]) U[t, (j, i)]          a_down.cu
//   grad   P[p, i]           = sum_t z[t, k_p] U[t, (j, i)]                          a_grad.cu
//
// Here p is an entry of A, k_p its column, and G[p, i] = A[j, k_p] gam[i, k_p]. The products share
// the entries of A as one array, the two compact value matrices (both a_support.cu), and z as token
// panels, so that a gathered feature is a row of tokens.
//
// `scale` goes into V and into the compact values rather than onto the results, because lam * gam
// alone is near the smallest f16.
#pragma once
#include "../device/columns.h"
#include "../device/launch.h"
#include "../device/tile.h"
#include "../kernels.h"
#include "panels.h"

namespace randlora::cuda {

// ---- tables -------------------------------------------------------------------------------------

// Tables of the supports S_j. They depend only on the basis: made once and kept with the packed
// basis, or made in every call if it has none.
struct Support {
  const int64_t* offset;  // (2 r + 1), that of A's lists: j has offset[2 j] .. offset[2 j + 2)
  int64_t r, n, d;
  int64_t copies;        // n padded to whole pieces of 16 bytes
  int64_t count;         // number of entries
  const int32_t* entry;  // (room), ascending by column: 2 k, plus 1 if A is -1; padding is -1
  const int32_t* at;  // (r, d): 2 p, plus 1 if A is -1, for the p-th entry of j; without an entry
                      // at column k, -1 - before(j, k)

  // Entries of j begin at first(j), which leaves room for whole groups without summing over smaller
  // j.
  __host__ __device__ int64_t room() const { return support_room(count, r); }
  __device__ __forceinline__ int64_t first(int64_t j) const {
    return support_room(offset[2 * j], j);
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
};

// ---- one operator call --------------------------------------------------------------------------

// As many of T tokens, in whole tiles, as have `features` each in `bytes`.
inline int64_t tokens_within(int64_t bytes, int64_t T, int64_t features, DType dtype) {
  return min(T, max(bytes / (features * bytes_of(dtype)) / 128, int64_t{1}) * 128);
}

// The products of the A side for up to T tokens at a time. Makes tables and values on first use.
class ASideCall {
 public:
  ASideCall(const IndependentLinear& p, int64_t T, Device& device);

  void set_operand(const void* z, int64_t T);  // (T, d): the operand of up and grad
  void up(void* V);                            // (T, K)
  void grad(const void* U, void* dlam, void* dgam, bool accumulate);
  void down(const void* U, int64_t T, void* out, bool accumulate);

 private:
  const Support& support();
  const void* values(bool with_lambda);  // (room, copies): scale lam G, or G
  // part_ tokens of z from t on, as panels: few enough that a part and its results stay in L2.
  const Panels& panels(int64_t t);

  const IndependentLinear p_;
  Device& device_;
  const void* z_ = nullptr;
  int64_t T_ = 0;
  Support support_ = {};
  void* values_[2] = {};
  int64_t part_;
  Panels panels_ = {};
  int64_t filled_ = -1;                               // the t of panels_
  void *partial_ = nullptr, *partial_lam_ = nullptr;  // for grad
};

// ---- tiles of sign-split lists (core/packed.h) --------------------------------------------------

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

// ---- device code --------------------------------------------------------------------------------

// Four warps, 2 x 2, over a tile of (32 MI, 16 NI).
template <class S, int MI, int NI>
struct BlockTile {
  using Tile = WarpTile<S, MI, NI>;
  using C = typename Tile::C;
  static constexpr int kThreads = 128, kM = 32 * MI, kN = 16 * NI;
  static constexpr int kDepth = sizeof(S) == 2 ? 32 : 16;  // terms of the sum per stage
  static constexpr int kStages = 3;
  static constexpr int kPad = sizeof(S) == 8 ? 2 : 8;         // by_k: rows of kM + kPad, kN + kPad
  static constexpr int kLineStride = kDepth + kPerAccess<S>;  // by_line

  static constexpr int kStoreStride = 8 * NI + 8;
  static constexpr int64_t kStoreBytes = 4 * 16 * kStoreStride * int64_t{sizeof(C)};

  static __device__ __forceinline__ int warp_m() { return threadIdx.x / 64 * (16 * MI); }
  static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % 2 * (8 * NI); }
};

// Calls fn(row, piece, u) for the u-th element of this thread's share of (Rows, Pieces). A thread
// always gets the same `piece`.
template <int Rows, int Pieces, int Threads, class F>
__device__ __forceinline__ void each_piece(const F& fn) {
  static_assert(Threads % Pieces == 0 && Rows * Pieces % Threads == 0, "equal shares");
#pragma unroll
  for (int u = 0; u < Rows * Pieces / Threads; ++u)
    fn(static_cast<int>(threadIdx.x) / Pieces + u * (Threads / Pieces),
       static_cast<int>(threadIdx.x) % Pieces, u);
}

// Writes the warp's accumulators to to[row * stride + col], for row < rows and col < cols. If
// `accumulate`, adds them to what is there. `shared` is a buffer of 16 rows in shared memory that
// no other warp uses.
template <class Out, class S, int MI, int NI>
__device__ __forceinline__ void store_rows(const WarpTile<S, MI, NI>& tile, ComputeOf<S>* shared,
                                           Out* to, int64_t stride, int64_t rows, int64_t cols,
                                           bool aligned, bool accumulate) {
  using Tile = WarpTile<S, MI, NI>;
  constexpr int kCols = 8 * NI, kStride = kCols + 8, kWidth = kPerAccess<Out>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MI; ++m) {
#pragma unroll
    for (int n = 0; n < NI; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared[Tile::row(0, e) * kStride + Tile::col(n, e)] = tile.acc[m][n][e];
    __syncwarp();
    if (aligned) {
      for (int x = lane; x < 16 * (kCols / kWidth); x += 32) {
        const int row = x / (kCols / kWidth), col = x % (kCols / kWidth) * kWidth;
        if (m * 16 + row >= rows || col >= cols) continue;
        Out* at = to + (m * 16 + row) * stride + col;
        Pack<Out, kWidth> pack = {};
        if (accumulate) pack = *reinterpret_cast<const Pack<Out, kWidth>*>(at);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const auto sum = shared[row * kStride + col + e];
          pack.set(e, narrow<Out>(accumulate ? widen(pack.get(e)) + sum : sum));
        }
        pack.store(at);
      }
    } else {
      for (int x = lane; x < 16 * kCols; x += 32) {
        const int row = x / kCols, col = x % kCols;
        if (m * 16 + row >= rows || col >= cols) continue;
        Out* at = to + (m * 16 + row) * stride + col;
        const auto sum = shared[row * kStride + col];
        *at = narrow<Out>(accumulate ? widen(*at) + sum : sum);
      }
    }
    __syncwarp();
  }
}

}  // namespace randlora::cuda
