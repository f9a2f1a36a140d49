// Loads the operand of a TernaryTile (ternary_tile.h) and stores its results, rounded once
// (rounded_store.h): lines of the tile are columns of the output.
#pragma once
#include "rounded_store.h"
#include "ternary_tile.h"

namespace randlora {

// Copies elements (row0 .. + Rows, col0 .. + Cols) of a row-major matrix (rows, cols), zeros
// outside it, to rows in shared memory. Aligned rows are copied by cp.async, for which the caller
// waits.
template <int Rows, int Cols, class S>
__device__ __forceinline__ void load_operand(S* to, int stride, const S* from, int64_t rows,
                                             int64_t cols, int64_t row0, int64_t col0,
                                             bool aligned) {
  constexpr int kWidth = kPerAccess<S>, kPacks = Cols / kWidth,
                kTurns = Rows * kPacks / kTileThreads;
  static_assert(kTileThreads % kPacks == 0 && kTurns * kTileThreads == Rows * kPacks);
  const int col = threadIdx.x % kPacks * kWidth, first_row = threadIdx.x / kPacks;
  const S* source = from + (row0 + first_row) * cols + col0 + col;
  const int64_t rows_left = rows - row0 - first_row, cols_left = cols - col0 - col;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    constexpr int kRows = kTileThreads / kPacks;  // in one turn
    S* at = to + (first_row + i * kRows) * stride + col;
    const bool inside = i * kRows < rows_left;
    if (aligned) {
      const bool whole = inside && cols_left > 0;
      cp_async16(at, whole ? source + i * kRows * cols : from, whole ? 16 : 0);
    } else {
#pragma unroll 1
      for (int v = 0; v < kWidth; ++v)
        at[v] = inside && v < cols_left ? source[i * kRows * cols + v] : S{};
    }
  }
}

// A matrix (rows, cols) of results.
template <class S>
struct Output {
  using C = ComputeOf<S>;
  static constexpr int kWidth = kPerAccess<S>;
  RoundedStore<S> store;
  int64_t rows, cols;
  bool aligned;

  __device__ __forceinline__ void put(int64_t row, int64_t col, const C (&v)[kWidth]) const {
    if (row >= rows || col >= cols) return;
    const int64_t first = row * cols + col;
    if (aligned) {
      using Run = Pack<S, kWidth>;
      Run x = store.base ? *reinterpret_cast<const Run*>(store.base + first) : Run{};
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x.set(e, store.rounded(v[e], x.get(e)));
      return x.store(store.out + first);
    }
#pragma unroll 1
    for (int e = 0; e < kWidth && col + e < cols; ++e) {
      C x = 0;
#pragma unroll
      for (int f = 0; f < kWidth; ++f) x = f == e ? v[f] : x;  // registers cannot be indexed
      store.one(first + e, x);
    }
  }
};

// Stores the tile at (line0, col0) of the product by way of shared memory, 16 columns of every warp
// at a time.
constexpr int kLinePitch = kLines + 4;  // no bank conflicts between lanes' fragments
template <class Tile>
constexpr int64_t store_bytes() {
  return int64_t(sizeof(typename Tile::C)) * Tile::kWarpsAcross * 16 * kLinePitch;
}
template <class Tile, class S>
__device__ __forceinline__ void store_tile(const Tile& tile, unsigned char* shared, int64_t line0,
                                           int64_t col0, const Output<S>& out) {
  using C = typename Tile::C;
  constexpr int kWidth = kPerAccess<S>;
  C* buffer = reinterpret_cast<C*>(shared);
#pragma unroll
  for (int first = 0; first < Tile::NI; first += 2) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Tile::MI; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int line = Tile::line(m, e), col = Tile::warp_n() * 16 + Tile::Warp::col(n, e);
          buffer[col * kLinePitch + line] = tile.warp.acc[m][first + n][e];
        }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x * kWidth; at < kLines * Tile::kWarpsAcross * 16;
         at += kTileThreads * kWidth) {
      const int col = at / kLines, line = at % kLines;
      C v[kWidth];
      load_run<kWidth>(buffer + col * kLinePitch + line, v);
      out.put(col0 + col / 16 * Tile::NI * 8 + first * 8 + col % 16, line0 + line, v);
    }
  }
}

}  // namespace randlora
