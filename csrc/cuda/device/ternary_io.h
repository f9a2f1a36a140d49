// Loads the operand of a TernaryTile (ternary_tile.h) and stores its results: to rows or, turned,
// to columns of a matrix; rounded once (rounded_store.h).
#pragma once
#include "rounded_store.h"
#include "ternary_tile.h"

namespace randlora {

// Copies elements (row0 .. + Rows, col0 .. + Cols) of a row-major matrix (rows, cols), zeros
// outside it, to rows in shared memory; by_k if the rows are slots. Aligned rows are copied by
// cp.async, for which the caller waits.
template <Order O, int Rows, int Cols, class S>
__device__ __forceinline__ void load_operand(S* to, int stride, const S* from, int64_t rows,
                                             int64_t cols, int64_t row0, int64_t col0,
                                             bool aligned) {
  constexpr int V = kPerAccess<S>, kPacks = Cols / V, kTurns = Rows * kPacks / kTileThreads;
  static_assert(kTileThreads % kPacks == 0 && kTurns * kTileThreads == Rows * kPacks);
  const int col = threadIdx.x % kPacks * V, first_row = threadIdx.x / kPacks;
  const S* source = from + (row0 + first_row) * cols + col0 + col;
  const int64_t rows_left = rows - row0 - first_row, cols_left = cols - col0 - col;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    constexpr int kRows = kTileThreads / kPacks;  // in one turn
    const int row = first_row + i * kRows;
    S* at = to + (O == Order::by_k ? row_of_slot(row) : row) * stride + col;
    const bool inside = i * kRows < rows_left;
    if (aligned) {
      const bool whole = inside && cols_left > 0;
      cp_async16(at, whole ? source + i * kRows * cols : from, whole ? 16 : 0);
    } else {
#pragma unroll 1
      for (int v = 0; v < V; ++v)
        at[v] = inside && v < cols_left ? source[i * kRows * cols + v] : S{};
    }
  }
}

// A matrix (rows, cols) of results.
template <class Store_>
struct Output {
  using Store = Store_;
  using S = typename Store::S;
  static constexpr int V = kPerAccess<S>;
  Store store;
  int64_t rows, cols;
  bool aligned;

  __device__ __forceinline__ void put(int64_t row, int64_t col,
                                      const typename Store::C (&v)[V]) const {
    if (row >= rows || col >= cols) return;
    if (aligned) return store.template run<V>(row * cols + col, v);
#pragma unroll 1
    for (int e = 0; e < V && col + e < cols; ++e) {
      typename Store::C x = 0;
#pragma unroll
      for (int f = 0; f < V; ++f) x = f == e ? v[f] : x;  // registers cannot be indexed
      store.one(row * cols + col + e, x);
    }
  }
};

// Stores the tile at (line0, col0) of the product by way of shared memory, 16 columns of every warp
// at a time. Rows of the output are lines or, if Turned, columns n.
template <bool Turned, class Tile>
constexpr int64_t store_bytes() {
  constexpr int kCols = Tile::WN * 16;
  return int64_t(sizeof(typename Tile::C)) * (Turned ? kCols * (kLines + 4) : kLines * (kCols + 8));
}
template <bool Turned, class Tile, class Out>
__device__ __forceinline__ void store_tile(const Tile& tile, unsigned char* shared, int64_t line0,
                                           int64_t col0, const Out& out) {
  using C = typename Tile::C;
  constexpr int V = kPerAccess<typename Out::S>;
  constexpr int kCols = Tile::WN * 16, kInner = Turned ? kLines : kCols;
  constexpr int kPitch = kInner + (Turned ? 4 : 8);  // no bank conflicts between lanes' fragments
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
          buffer[Turned ? col * kPitch + line : line * kPitch + col] =
              tile.warp.acc[m][first + n][e];
        }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x * V; at < kLines * kCols; at += kTileThreads * V) {
      const int outer = at / kInner, inner = at % kInner;
      C v[V];
      load_run<V>(buffer + outer * kPitch + inner, v);
      const int buffered = Turned ? outer : inner;
      const int64_t line = line0 + (Turned ? inner : outer);
      const int64_t col = col0 + buffered / 16 * Tile::NI * 8 + first * 8 + buffered % 16;
      out.put(Turned ? col : line, Turned ? line : col, v);
    }
  }
}

}  // namespace randlora
