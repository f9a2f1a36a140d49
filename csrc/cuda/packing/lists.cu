// Packing: sorted sign-split lists (core/packed.h) of a ternary matrix in bit planes, by row or by
// column, as in csrc/cpu/packing.cpp. There are two steps because the length must be known first:
//
//   count_lists   offset[2 q + 1], offset[2 q + 2] = how many +1, -1 in line q; inclusive scan
//   fill_lists    index[offset[2 q] ...] = positions of the +1, then of the -1, ascending
//
// Lists by column are lists by row of the transposed planes, which are made in scratch memory. So
// both steps see only one layout, in which a warp reads a line contiguously.
//
//   transpose     a block transposes 256 x 256 bits, read and written as 32-byte sectors; a warp
//                 transposes 32 x 32 of them in registers, by five exchanges
//   count, fill   a warp takes a line, a lane every 32nd word of it; a scan over the lanes tells
//                 each lane where its positions go
//   scan          tiles of a block; then every tile adds the totals of those before it
//
// Floor: the planes are read twice (2 bits per element each time), and 2 bytes per non-zero element
// are written. By column, each step first reads and writes the planes to transpose them.
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

// The sum of x over this lane and those below it.
template <class Number>
__device__ __forceinline__ Number scan_warp(Number x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number below = __shfl_up_sync(kWarp, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// ---- transposition ------------------------------------------------------------------------------

constexpr int kSide = 256;              // rows and columns of a tile
constexpr int kTileWords = kSide / 64;  // per row of a tile
constexpr int kStride =
    kSide / 32 + 1;  // 32-bit words a row in shared memory; odd: no bank conflicts

// Bit c of lane r's word becomes bit r of lane c's, like transpose_64x64 of core/packed.h.
__device__ __forceinline__ uint32_t transpose_32x32(uint32_t x) {
  const int lane = threadIdx.x % 32;
  uint32_t mask = 0x0000ffffu;
#pragma unroll
  for (int s = 16; s != 0; s >>= 1, mask ^= mask << s) {
    const uint32_t other = __shfl_xor_sync(kWarp, x, s);
    x = lane & s ? (x & ~mask) | (other >> s & mask) : (x & mask) | (other << s & ~mask);
  }
  return x;
}

// blockIdx.x: tile, row by row of tiles; blockIdx.y: plane.
__global__ void transpose_planes_kernel(Planes in, int64_t rows, int64_t cols, uint64_t* plus,
                                        uint64_t* minus, int64_t tiles_across) {
  auto* before = reinterpret_cast<uint32_t*>(shared_memory());  // (kSide rows, kStride)
  uint32_t* after = before + kSide * kStride;                   // (kSide columns, kStride)
  const uint64_t* from = blockIdx.y ? in.minus : in.plus;
  uint64_t* to = blockIdx.y ? minus : plus;
  const int64_t first_row = blockIdx.x / tiles_across * kSide, out_words = words_of(rows);
  const int64_t first_col = blockIdx.x % tiles_across * kSide;
  for (int e = threadIdx.x; e < kSide * kTileWords; e += blockDim.x) {
    const int64_t row = first_row + e / kTileWords, word = first_col / 64 + e % kTileWords;
    const uint64_t m = row < rows && word < in.words ? from[row * in.words + word] : 0;
    uint32_t* half = before + e / kTileWords * kStride + e % kTileWords * 2;
    half[0] = static_cast<uint32_t>(m), half[1] = static_cast<uint32_t>(m >> 32);
  }
  __syncthreads();
  constexpr int kSquares = kSide / 32;  // along each side
  const int lane = threadIdx.x % 32;
  for (int s = threadIdx.x / 32; s < kSquares * kSquares; s += blockDim.x / 32) {
    const int r = s / kSquares, c = s % kSquares;
    after[(c * 32 + lane) * kStride + r] = transpose_32x32(before[(r * 32 + lane) * kStride + c]);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kSide * kTileWords; e += blockDim.x) {
    const int64_t col = first_col + e / kTileWords, word = first_row / 64 + e % kTileWords;
    if (col >= cols || word >= out_words) continue;
    const uint32_t* half = after + e / kTileWords * kStride + e % kTileWords * 2;
    to[col * out_words + word] = uint64_t{half[1]} << 32 | half[0];
  }
}

// ---- count and scan -----------------------------------------------------------------------------

__global__ void count_lists_kernel(Planes p, int64_t lines, int64_t* offset) {
  const int64_t line = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (line == 0 && lane == 0) offset[0] = 0;
  if (line >= lines) return;
  int64_t sums[2] = {};
  for (int64_t w = line * p.words + lane; w < (line + 1) * p.words; w += 32) {
    sums[0] += __popcll(p.plus[w]);
    sums[1] += __popcll(p.minus[w]);
  }
  const int64_t sum = warp_sums<2>(sums);
  if (lane % 16 == 0) offset[2 * line + 1 + lane / 16] = sum;
}

constexpr int kItems = 4;  // values a thread scans

// The sum of x over the threads of the block below this one; `total` over all of them.
__device__ __forceinline__ int64_t scan_block(int64_t x, int64_t* total) {
  auto* of_warp = reinterpret_cast<int64_t*>(shared_memory());
  const int64_t up_to = scan_warp(x);
  if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = up_to;
  __syncthreads();
  int64_t before = up_to - x;
  *total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    if (w < threadIdx.x / 32) before += of_warp[w];
    *total += of_warp[w];
  }
  return before;
}

// Scans each tile in place and stores the tiles' totals.
__global__ void scan_tiles_kernel(int64_t* value, int64_t count, int64_t* totals) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kItems;
  int64_t up_to[kItems], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kItems; ++i) up_to[i] = sum += first + i < count ? value[first + i] : 0;
  const int64_t before = scan_block(sum, &total);
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (first + i < count) value[first + i] = before + up_to[i];
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// Every tile but the first adds the totals of those before it. They are few, so each tile sums
// them.
__global__ void add_totals_kernel(int64_t* value, int64_t count, const int64_t* totals) {
  const int64_t tile = int64_t{blockIdx.x} + 1;
  int64_t mine = 0, before;
  for (int64_t t = threadIdx.x; t < tile; t += blockDim.x) mine += totals[t];
  scan_block(mine, &before);
  const int64_t first = tile * blockDim.x * kItems;
  for (int i = threadIdx.x; i < int(blockDim.x) * kItems; i += blockDim.x)
    if (first + i < count) value[first + i] += before;
}

// ---- fill ---------------------------------------------------------------------------------------

__device__ __forceinline__ void put(uint64_t m, int64_t base, uint16_t* at) {
  for (; m; m &= m - 1) *at++ = static_cast<uint16_t>(base + __ffsll(m) - 1);
}

__global__ void fill_lists_kernel(Planes p, int64_t lines, const int64_t* offset, uint16_t* index) {
  const int64_t line = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (line >= lines) return;
  const int lane = threadIdx.x % 32;
  uint16_t *at_plus = index + offset[2 * line], *at_minus = index + offset[2 * line + 1];
  for (int64_t first = 0; first < p.words; first += 32) {
    const int64_t w = first + lane;
    const uint64_t plus = w < p.words ? p.plus[line * p.words + w] : 0;
    const uint64_t minus = w < p.words ? p.minus[line * p.words + w] : 0;
    // Both counts in one scan: a warp holds at most 2048 of either.
    const unsigned mine = __popcll(plus) | __popcll(minus) << 16;
    const unsigned up_to = scan_warp(mine), before = up_to - mine;
    put(plus, w * 64, at_plus + (before & 0xffffu));
    put(minus, w * 64, at_minus + (before >> 16));
    const unsigned all = __shfl_sync(kWarp, up_to, 31);
    at_plus += all & 0xffffu;
    at_minus += all >> 16;
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Planes whose rows are the lines of the lists.
Planes by_line(const CountLists& p, Device& device) {
  if (!p.by_column) return p.planes;
  const int64_t words = words_of(p.rows), across = ceil_div(p.cols, kSide);
  uint64_t* plus = scratch<uint64_t>(device, 2 * p.cols * words);
  uint64_t* minus = plus + p.cols * words;
  launch(device, "transpose_planes", transpose_planes_kernel, {ceil_div(p.rows, kSide) * across, 2},
         device.max_threads, 2 * kSide * kStride * int64_t{sizeof(uint32_t)}, p.planes, p.rows,
         p.cols, plus, minus, across);
  return {plus, minus, words};
}

}  // namespace

void count_lists(const CountLists& p, Device& device) {
  const int64_t lines = p.lines(), threads = device.max_threads;
  const int64_t blocks = max(int64_t{1}, ceil_div(lines, threads / 32));
  launch(device, "count_lists", count_lists_kernel, blocks, threads, 0, by_line(p, device), lines,
         p.offset);
  const int64_t count = 2 * lines, tiles = ceil_div(count, threads * kItems);
  if (tiles > 0) {
    int64_t* totals = scratch<int64_t>(device, tiles);
    const int64_t shared = threads / 32 * int64_t{sizeof(int64_t)};
    launch(device, "scan_tiles", scan_tiles_kernel, tiles, threads, shared, p.offset + 1, count,
           totals);
    launch(device, "add_totals", add_totals_kernel, tiles - 1, threads, shared, p.offset + 1, count,
           totals);
  }
}

void fill_lists(const FillLists& p, Device& device) {
  launch(device, "fill_lists", fill_lists_kernel, ceil_div(p.lines(), device.max_threads / 32),
         device.max_threads, 0, by_line(p, device), p.lines(), p.offset, p.index);
}

}  // namespace randlora::cuda
