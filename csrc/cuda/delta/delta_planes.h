// What delta_weight and its adjoint derive from a basis before they multiply: B's codes (decode.h)
// in the order in which they are contracted, and the signs of A.
//
// Both process 16 bases i of one rank index j at a time: one code word holds 16 columns c = j n + i
// of B. So gamma[i, .] is read once and serves all j, and no word of B straddles two j. Zeros pad
// the bases to whole chunks of 16 and the rank indices to whole octets.
//
// Floor: D K / 4 bytes of planes read and as many bytes of codes written; r d bytes of signs.
#pragma once
#include "../../core/operators.h"
#include "../device/columns.h"
#include "../device/decode.h"
#include "../device/launch.h"
#include "../device/ternary_tile.h"

namespace randlora::cuda {

constexpr int kBases = 16;              // of one rank index in a code word
constexpr int kQuad = 4;                // rank indices in a 64-slot step of delta_weight
constexpr int kOctet = 8;               // rank indices in 128 lines of its adjoint
constexpr int kTileWords = 4 * kLines;  // of a tile of codes in global memory: [q][line]

struct DeltaShape {
  int64_t D, d, r, n;
  explicit DeltaShape(const Basis& b) : D(b.D), d(b.d), r(b.r), n(b.n) {}
  __host__ __device__ int64_t chunks() const { return ceil_div(n, kBases); }
  __host__ __device__ int64_t octets() const { return ceil_div(r, kOctet); }
  __host__ __device__ int64_t quads() const { return ceil_div(r, kQuad); }
  __host__ __device__ int64_t groups() const { return ceil_div(n, 64); }  // of 64 bases
};

// delta_codes.cu
// tiles[row block][chunk][quad]: lines are 128 rows; word q of a line is rank index 4 quad + q.
const uint32_t* row_codes(const Basis& b, Device& device);
// tiles[chunk][octet][64 rows]: line (j % 8) * 16 + i % 16; its word q has rows from 16 q on.
const uint32_t* column_codes(const Basis& b, Device& device);
// signs[quad][k]: A[j, k] for the four j of a quad, one byte each.
const uint32_t* signs_of_A(const Basis& b, Device& device);

// Copies a tile of codes from global to shared memory by cp.async.
__device__ __forceinline__ void load_codes(uint32_t* to, const uint32_t* tile) {
  const int q = threadIdx.x / 32, line = threadIdx.x % 32 * 4;
  cp_async16(to + q * kCodePitch + line, tile + q * kLines + line);
}

// Byte `at` of four signs, as -1, 0 or 1.
__device__ __forceinline__ int sign_of(uint32_t signs, int at) {
  return static_cast<int8_t>(signs >> 8 * at);
}

}  // namespace randlora::cuda
