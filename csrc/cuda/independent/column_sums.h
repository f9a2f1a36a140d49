// Sums in shared memory, a row of `Tokens` for every column. Warps add their tiles to them without
// bank conflicts (a_down.cu). A tile's lines are columns in any order, and its columns are tokens.
//
// A part is four units of 16 bytes. A lane of mma's fragments (ptx.h) holds two adjacent tokens of
// 8, so place_of_token permutes the tokens to give a lane a whole unit of every part: in fp32, four
// adjacent tokens of 16. Eight lanes then access two lines of the tile, one part of each. Both
// parts would use the same banks, so lanes of odd lines take the second part of a pair first.
//
// `turn` exchanges units within a part, and parts within a pair, by column, so that reading a token
// of several columns has few conflicts, too. S is the type that results are stored in.
#pragma once
#include "../device/columns.h"
#include "../device/tile.h"

namespace randlora {

template <class S, int Tokens>
struct ColumnSums {
  using C = ComputeOf<S>;
  static constexpr int kUnit = kPerAccess<C>, kPart = 4 * kUnit, kParts = Tokens / kPart;
  static_assert(kParts % 2 == 0, "parts are taken in pairs");
  C* sums;

  static __device__ __forceinline__ int turn(int column) {
    return column / kPerAccess<S> * (kPerAccess<S> / kUnit) % 8;
  }
  __device__ __forceinline__ C& at(int column, int token) const {
    return sums[column * Tokens + ((token / kUnit ^ turn(column)) * kUnit | token % kUnit)];
  }

  // The column of the tile that must hold `token`.
  static __device__ __forceinline__ int place_of_token(int token) {
    if constexpr (kUnit == 2) return token;
    return token / 16 * 16 + token % 4 / 2 * 8 + token % 16 / 4 * 2 + token % 2;
  }

  // Adds a tile. column[m][h] is where its line Tile::row(m, 2 h) goes, or -1 to skip the line. All
  // lines of a fragment are read before one is written, because the compiler cannot know that they
  // differ.
  template <class Tile, int MI>
  __device__ __forceinline__ void add(const Tile& tile, const int (&column)[MI][2]) const {
    using Unit = Pack<C, kUnit>;
    const int q = threadIdx.x % 4, odd = threadIdx.x / 4 % 2;
#pragma unroll
    for (int m = 0; m < MI; ++m) {
      Unit sum[2][kParts];
      C* to[2][kParts];
      bool exchanged[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int by = turn(column[m][h]);
        exchanged[h] = odd ^ by / 4;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int unit = (part ^ odd) * 4 | ((q ^ by) & 3);
          to[h][part] = sums + column[m][h] * Tokens + unit * kUnit;
          if (column[m][h] >= 0) sum[h][part] = *reinterpret_cast<const Unit*>(to[h][part]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int e = 0; e < kUnit; ++e) {
            const C here = element(tile.acc[m], part, h, e);
            const C there = element(tile.acc[m], part ^ 1, h, e);
            sum[h][part].set(e, sum[h][part].get(e) + (exchanged[h] ? there : here));
          }
          if (column[m][h] >= 0) *reinterpret_cast<Unit*>(to[h][part]) = sum[h][part];
        }
    }
  }

 private:
  // Element e of the unit of a part that the lane holds.
  template <int NI>
  static __device__ __forceinline__ C element(const C (&line)[NI][4], int part, int h, int e) {
    if constexpr (kUnit == 2) return line[part][2 * h + e];
    return line[2 * part + e / 2][2 * h + e % 2];
  }
};

}  // namespace randlora
