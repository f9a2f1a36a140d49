// A warp's share of a matrix product from shared memory:
//
//   acc (16 MI, 8 NI) += left (16 MI, k) right (k, 8 NI)
//
// MI x NI are tiles of mma's m16n8.
//
// Two engines with one interface and one accumulator layout, that of mma's C fragment (ptx.h), so
// that a kernel is written once for every dtype:
//   bf16, f16       mma m16n8k16, operands by ldmatrix
//   float, double   FMA
//
// Operands lie in shared memory in one of two orders:
//   by_line   element (line, k) at p[line * stride + k]   (line: row of left, column of right)
//   by_k      element (line, k) at p[k * stride + line]
// For 16-bit types p and stride * sizeof(S) must be 16-byte aligned; a stride of 8 modulo 64
// elements keeps ldmatrix free of bank conflicts.
#pragma once
#include "element.h"
#include "ptx.h"

namespace randlora {

enum class Order { by_line, by_k };

// A block's loop over stages of shared memory: load(step, stage) issues copies (cp.async, or plain
// stores) Stages - 1 steps ahead of use(stage).
template <int Stages, class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Use& use) {
#pragma unroll
  for (int s = 0; s < Stages - 1; ++s) {
    if (s < steps) load(s, s);
    cp_async_commit();
  }
  int stage = 0;
  for (int s = 0; s < steps; ++s) {
    cp_async_wait<Stages - 2>();
    __syncthreads();
    const int free = stage == 0 ? Stages - 1 : stage - 1;
    if (s + Stages - 1 < steps) load(s + Stages - 1, free);
    cp_async_commit();
    use(stage);
    stage = stage == Stages - 1 ? 0 : stage + 1;
  }
}

template <class S, int MI, int NI>
struct WarpTile {
  using C = ComputeOf<S>;
  static constexpr int kStep = 16;  // k advances by this; callers pad k with zeros
  C acc[MI][NI][4] = {};

  // Row and column within the warp's tile of acc[m][n][e].
  static __device__ __forceinline__ int row(int m, int e) {
    return m * 16 + (threadIdx.x % 32) / 4 + (e / 2) * 8;
  }
  static __device__ __forceinline__ int col(int n, int e) {
    return n * 8 + (threadIdx.x % 4) * 2 + e % 2;
  }

  // One step of kStep. `left` points at line 0, k 0 of the warp's lines, `right` likewise.
  template <Order Left, Order Right>
  __device__ __forceinline__ void step(const S* left, int left_stride, const S* right,
                                       int right_stride) {
    if constexpr (sizeof(S) == 2) {
      uint32_t right_part[NI][2];
      load_right<Right>(right_part, right, right_stride);
#pragma unroll
      for (int m = 0; m < MI; ++m) {
        uint32_t left_part[4];
        load_left<Left>(left_part, left, left_stride, m * 16);
#pragma unroll
        for (int n = 0; n < NI; ++n) mma(acc[m][n], left_part, right_part[n], S{});
      }
    } else {
      fma_step<Left, Right>(left, left_stride, right, right_stride);
    }
  }

  // The 16-bit right fragments of a step.
  template <Order Lines>
  static __device__ __forceinline__ void load_right(uint32_t (&right_part)[NI][2], const S* right,
                                                    int stride) {
    static_assert(NI % 2 == 0, "ldmatrix x4 loads two column tiles");
    const int l = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < NI; n += 2) {
      uint32_t r[4];  // k 0-7 and k 8-15 of columns 8n.., then of columns 8n+8..
      if constexpr (Lines == Order::by_line)
        ldmatrix_x4(r, right + (n * 8 + l % 8 + l / 16 * 8) * stride + l / 8 % 2 * 8);
      else
        ldmatrix_x4_trans(r, right + (l % 16) * stride + n * 8 + l / 16 * 8);
      right_part[n][0] = r[0];
      right_part[n][1] = r[1];
      right_part[n + 1][0] = r[2];
      right_part[n + 1][1] = r[3];
    }
  }

 private:
  template <Order Lines>
  static __device__ __forceinline__ S at(const S* p, int stride, int line, int k) {
    return Lines == Order::by_line ? p[line * stride + k] : p[k * stride + line];
  }

  template <Order Lines>
  static __device__ __forceinline__ void load_left(uint32_t (&left_part)[4], const S* left,
                                                   int stride, int line) {
    const int l = threadIdx.x % 32;
    if constexpr (Lines == Order::by_line)
      ldmatrix_x4(left_part, left + (line + l % 16) * stride + l / 16 * 8);
    else  // matrices: lines 0-7 k 0-7, lines 8-15 k 0-7, lines 0-7 k 8-15, lines 8-15 k 8-15
      ldmatrix_x4_trans(left_part, left + (l % 8 + l / 16 * 8) * stride + line + l / 8 % 2 * 8);
  }

  template <Order Left, Order Right>
  __device__ __forceinline__ void fma_step(const S* left, int left_stride, const S* right,
                                           int right_stride) {
    const int g = (threadIdx.x % 32) / 4, q = threadIdx.x % 4;
#pragma unroll 4
    for (int k = 0; k < kStep; ++k) {
      S right_value[NI][2];
#pragma unroll
      for (int n = 0; n < NI; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          right_value[n][h] = at<Right>(right, right_stride, n * 8 + q * 2 + h, k);
#pragma unroll
      for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const S left_value = at<Left>(left, left_stride, m * 16 + g + h * 8, k);
#pragma unroll
          for (int n = 0; n < NI; ++n) {
            acc[m][n][2 * h] += left_value * right_value[n][0];
            acc[m][n][2 * h + 1] += left_value * right_value[n][1];
          }
        }
    }
  }
};

}  // namespace randlora
