// A block's tile of a product whose left operand is B or its transpose, as codes (decode.h):
//
//   acc (128 lines, tokens) += 2 * codes (128 lines, 64 slots) operand (64 slots, tokens)
//
// Lines are rows of B and slots its columns, or the reverse. Four warps share the tile; a step is
// 64 slots deep. Left fragments are decoded from registers that hold 16 slots of a line each, so
// the contraction takes slots in an order of its own: lanes l with l % 4 == q hold slots
// 16 q .. 16 q + 15, and the k-th mma of a step takes the slots with (slot % 16) / 4 == k.
//
// Code word q of a line lies at codes[q * kCodePitch + line]; element (slot, t) of the operand at
// p[t * stride + slot]: its rows are rows of x or V.
//
// Two engines as in tile.h. FMA skips zeros of B, so NaN and inf do not pass through them.
// Tensor cores multiply by the zeros, so a NaN or inf spoils its whole token.
#pragma once
#include "columns.h"
#include "decode.h"
#include "tile.h"

namespace randlora {

constexpr int kTileThreads = 128;
constexpr int kLines = 128, kSlots = 64;
constexpr int kCodePitch = kLines + 8;          // 8 modulo 32, as is the size of a tile's codes:
constexpr int kCodeWords = 4 * kCodePitch + 8;  // free of bank conflicts across q and across tiles

// Tokens of a full tile: its operand takes 18 KB of shared memory in every dtype.
template <class S>
constexpr int kColumns = 256 / int(sizeof(S));

template <class S_, int Tokens>
struct TernaryTile {
  using S = S_;
  using C = ComputeOf<S>;
  static constexpr int kTokens = Tokens;
  static constexpr int kWarpsAcross = Tokens >= 64 ? 2 : 1, kWarpsDown = 4 / kWarpsAcross;
  static constexpr int MI = kLines / 16 / kWarpsDown, NI = Tokens / 8 / kWarpsAcross;
  using Warp = WarpTile<S, MI, NI>;
  Warp warp;

  // 16 bytes between rows in shared memory: 8 lanes that read 16 bytes each meet no bank conflict.
  static constexpr int stride(int elements) { return elements + kPerAccess<S>; }

  static __device__ __forceinline__ int warp_m() { return threadIdx.x / 32 / kWarpsAcross; }
  static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % kWarpsAcross; }
  // Place in the block's tile of acc[m][n][e].
  static __device__ __forceinline__ int line(int m, int e) {
    return warp_m() * MI * 16 + Warp::row(m, e);
  }
  static __device__ __forceinline__ int col(int n, int e) {
    return warp_n() * NI * 8 + Warp::col(n, e);
  }

  __device__ __forceinline__ void step(const uint32_t* codes, const S* operand, int stride) {
    codes += warp_m() * MI * 16;
    operand += warp_n() * NI * 8 * stride;
    if constexpr (sizeof(S) > 2) {
      fma_step(codes, operand, stride);
    } else {
      uint32_t word[MI][2];
      load_codes(word, codes + threadIdx.x % 4 * kCodePitch);
      mma_step(word, operand, stride);
    }
  }

 private:
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int q() { return threadIdx.x % 4; }

  static __device__ __forceinline__ void load_codes(uint32_t (&word)[MI][2],
                                                    const uint32_t* codes) {
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) word[m][h] = codes[m * 16 + h * 8 + g()];
  }

  // The k-th of four steps of 16 slots.
  static __device__ __forceinline__ void decode(uint32_t (&left_part)[4], const uint32_t (&word)[2],
                                                int k) {
#pragma unroll
    for (int h = 0; h < 4; ++h) left_part[h] = decode_pair(word[h % 2], 2 * k + h / 2);
  }

  __device__ __forceinline__ void mma_step(const uint32_t (&word)[MI][2], const S* operand,
                                           int stride) {
    operand += g() * stride + q() * 16;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      Pack<S, 8> right_part[NI];  // right fragments of two steps
#pragma unroll
      for (int n = 0; n < NI; ++n)
        right_part[n] = *reinterpret_cast<const Pack<S, 8>*>(operand + n * 8 * stride + k * 4);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int m = 0; m < MI; ++m) {
          uint32_t left_part[4];
          decode(left_part, word[m], k + s);
#pragma unroll
          for (int n = 0; n < NI; ++n)
            mma(warp.acc[m][n], left_part,
                {right_part[n].word[2 * s], right_part[n].word[2 * s + 1]}, S{});
        }
    }
  }

  // Without tensor cores. Each thread computes the same elements of acc that mma would leave in its
  // registers, and sums over all slots by itself.
  __device__ __forceinline__ void fma_step(const uint32_t* codes, const S* operand, int stride) {
#pragma unroll 1
    for (int part = 0; part < 4; ++part) {
      uint32_t word[MI][2];
      load_codes(word, codes + part * kCodePitch);
#pragma unroll 1
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          S right_value[NI][2];
#pragma unroll
          for (int n = 0; n < NI; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              right_value[n][c] = operand[(n * 8 + q() * 2 + c) * stride + part * 16 + 2 * t + e];
#pragma unroll
          for (int m = 0; m < MI; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t top = decode_top(word[m][h], t, e);
              const S left_value = from_top(top, S{});
              if (top != 0) {
#pragma unroll
                for (int n = 0; n < NI; ++n)
#pragma unroll
                  for (int c = 0; c < 2; ++c)
                    warp.acc[m][n][2 * h + c] += left_value * right_value[n][c];
              }
            }
        }
    }
  }
};

}  // namespace randlora
