// Makes what delta_planes.h declares: B's codes in tiles, A's signs as bytes.
#include "delta_planes.h"

namespace randlora::cuda {
namespace {

// Both planes of a row at columns (j, i .. i + 63).
struct SixtyFour {
  uint64_t plus = 0, minus = 0;
  __device__ __forceinline__ SixtyFour(const Planes& b, const DeltaShape& s, int64_t row, int64_t j,
                                       int64_t i) {
    if (row >= s.D || j >= s.r || i >= s.n) return;
    const int64_t count = min(s.n - i, int64_t{64});
    plus = Planes::bits(b.plus + row * b.words, j * s.n + i, count);
    minus = Planes::bits(b.minus + row * b.words, j * s.n + i, count);
  }
};

// A thread takes 64 bases of one j in one row.
__global__ void __launch_bounds__(kTileThreads)
    row_codes_kernel(Planes b, DeltaShape s, uint32_t* tiles) {
  const int64_t group = blockIdx.x % s.groups();
  const int64_t j = blockIdx.x / s.groups() % (s.quads() * kQuad);
  const int64_t row_block = blockIdx.x / s.groups() / (s.quads() * kQuad);
  const SixtyFour bits(b, s, row_block * kLines + threadIdx.x, j, group * 64);
  uint32_t word[4];
  encode_row(bits.plus, bits.minus, word);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int64_t chunk = group * 4 + w;
    if (chunk < s.chunks())
      tiles[((row_block * s.chunks() + chunk) * s.quads() + j / kQuad) * kTileWords +
            j % kQuad * kLines + threadIdx.x] = word[w];
  }
}

// A half-warp takes 16 rows of 64 bases of one j.
__global__ void __launch_bounds__(kTileThreads)
    column_codes_kernel(Planes b, DeltaShape s, uint32_t* tiles) {
  const int64_t steps = ceil_div(s.D, kSlots);
  const int64_t pairs = s.octets() * kOctet / 2 * s.groups();
  const int64_t item = blockIdx.x % pairs * 2 + threadIdx.x % 32 / 16, step = blockIdx.x / pairs;
  const int64_t group = item % s.groups(), j = item / s.groups();
  const int q = threadIdx.x / 32, lane = threadIdx.x % 16;
  const SixtyFour bits(b, s, step * kSlots + q * 16 + row_of_lane(lane), j, group * 64);
  uint32_t word[4];
  encode_columns(bits.plus, bits.minus, word);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t i = group * 64 + column_of_lane(lane, m), chunk = i / kBases;
    if (chunk < s.chunks())
      tiles[((chunk * s.octets() + j / kOctet) * steps + step) * kTileWords + q * kLines +
            j % kOctet * kBases + i % kBases] = word[m];
  }
}

// From A's lists. A block writes one j.
template <class Index>
__global__ void __launch_bounds__(kTileThreads)
    signs_kernel(Lists<Index> a, DeltaShape s, int8_t* signs) {
  const int64_t j = blockIdx.x;
  int8_t* row = signs + j / kQuad * s.d * kQuad + j % kQuad;
  for (int64_t k = threadIdx.x; k < s.d; k += kTileThreads) row[k * kQuad] = 0;
  if (j >= s.r) return;
  __syncthreads();
  const int64_t minus = a.minus(j), end = a.end(j);
  for (int64_t p = a.plus(j) + threadIdx.x; p < end; p += kTileThreads)
    row[int64_t{a.index[p]} * kQuad] = p < minus ? 1 : -1;
}

}  // namespace

const uint32_t* row_codes(const Basis& b, Device& device) {
  const DeltaShape s(b);
  const int64_t row_blocks = ceil_div(s.D, kLines);
  auto* tiles = scratch<uint32_t>(device, row_blocks * s.chunks() * s.quads() * kTileWords);
  launch(device, "row_codes", row_codes_kernel, row_blocks * s.quads() * kQuad * s.groups(),
         kTileThreads, 0, b.b_planes, s, tiles);
  return tiles;
}

const uint32_t* column_codes(const Basis& b, Device& device) {
  const DeltaShape s(b);
  const int64_t steps = ceil_div(s.D, kSlots);
  auto* tiles = scratch<uint32_t>(device, s.chunks() * s.octets() * steps * kTileWords);
  launch(device, "column_codes", column_codes_kernel, steps * s.octets() * kOctet / 2 * s.groups(),
         kTileThreads, 0, b.b_planes, s, tiles);
  return tiles;
}

const uint32_t* signs_of_A(const Basis& b, Device& device) {
  const DeltaShape s(b);
  auto* signs = scratch<int8_t>(device, s.octets() * kOctet * s.d);
  b.a.typed([&](auto a) {
    launch(device, "signs", signs_kernel<typename decltype(a)::Index>, s.octets() * kOctet,
           kTileThreads, 0, a, s, signs);
  });
  return reinterpret_cast<const uint32_t*>(signs);
}

}  // namespace randlora::cuda
