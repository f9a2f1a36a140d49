// Generation: bit planes of any slice of a seed's infinite ternary matrix (docs/basis-spec.md).
//
//   planes[s][q][w] bit b: element (role, row_start + q, col_start + 64w + b) is +1 (s = 0), -1 (1)
//
// One thread makes one word of both planes: it walks the 16 counters of a group of 64 columns, and
// each counter gives four bits. Sharing a group between 16 threads would need the same compares,
// and ballots in addition. The words of a warp lie side by side, so its stores coalesce. If a slice
// starts inside a group, each of its words needs two groups, and its thread computes both.
//
// Block bases store signs by column: a thread makes a word of 64 rows for each of the up to four
// columns of one counter in a chunk. Neighboring threads make neighboring words of the same
// columns, so their stores coalesce, and they skip a counter together.
//
// Floor: one Philox call per four elements, 2 bits written per element. Integer arithmetic
// dominates.
#include "../../core/ternary_spec.h"
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora {
namespace cuda {
namespace {

struct Words {
  uint64_t plus, minus;
};

// Both plane words of columns 64 * group ... of a row.
__device__ __forceinline__ Words group_words(const FillPlanes& p, uint32_t row, uint32_t group) {
  uint32_t plus[2] = {0, 0}, minus[2] = {0, 0};  // halves of a word: the card has 32-bit integers
#pragma unroll 4
  for (uint32_t l = 0; l < kCountersPerGroup; ++l) {
    const Counter4 u = philox4x32_10(counter_of(p.role, row, group * kCountersPerGroup + l),
                                     key0_of(p.seed), key1_of(p.seed));
    const uint32_t low = 1u << l, high = 1u << (l + 16);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t bit = w % 2 ? high : low;  // output word w is columns 16 w + l
      if (is_plus(u.v[w], p.threshold)) plus[w / 2] |= bit;
      if (is_minus(u.v[w], p.threshold)) minus[w / 2] |= bit;
    }
  }
  return {uint64_t{plus[1]} << 32 | plus[0], uint64_t{minus[1]} << 32 | minus[0]};
}

__global__ void fill_planes_kernel(FillPlanes p, int64_t words) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= p.rows * words) return;
  const int64_t q = at / words, w = at % words;
  const int shift = static_cast<int>(p.col_start & 63);
  const int64_t here = p.cols - 64 * w < 64 ? p.cols - 64 * w : 64;  // columns of this word
  const int64_t group = (p.col_start >> 6) + w;
  Words word = {0, 0};
  // Part 0 is this word's own group. Part 1 is the next group, computed only if the word reaches
  // it: the last column of the specification has no next group.
  for (int part = 0; part < 2; ++part) {
    if (part == 1 && here <= 64 - shift) break;
    const Words g =
        group_words(p, static_cast<uint32_t>(p.row_start + q), static_cast<uint32_t>(group + part));
    if (part == 0) {
      word = {g.plus >> shift, g.minus >> shift};
    } else {  // shift is not 0 here
      word.plus |= g.plus << (64 - shift);
      word.minus |= g.minus << (64 - shift);
    }
  }
  const uint64_t keep = ~uint64_t{0} >> (64 - here);
  p.plus[at] = word.plus & keep;
  p.minus[at] = word.minus & keep;
}

__global__ void fill_blocks_kernel(FillBlocks p, int64_t words, int64_t counters, uint32_t half) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= p.chunks * counters * words) return;
  const int64_t word = at % words, counter = at / words % counters, chunk = at / words / counters;
  const int64_t group = p.first_group() + counter / kCountersPerGroup;
  const int64_t l = counter % kCountersPerGroup;
  uint64_t* row[4];
  p.rows_of(chunk, group, l, row);
  if (!row[0] && !row[1] && !row[2] && !row[3]) return;
  const uint32_t first_row = static_cast<uint32_t>((p.first_chunk + chunk) * p.height + 64 * word);
  const int rows = static_cast<int>(p.height - 64 * word < 64 ? p.height - 64 * word : 64);
  uint64_t bits[4] = {0, 0, 0, 0};
#pragma unroll 2
  for (int t = 0; t < rows; ++t) {
    const Counter4 u = philox4x32_10(
        counter_of(kRoleB, first_row + t, static_cast<uint32_t>(group * kCountersPerGroup + l)),
        key0_of(p.seed), key1_of(p.seed));
#pragma unroll
    for (int w = 0; w < 4; ++w) bits[w] |= uint64_t{is_plus(u.v[w], half)} << t;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w)
    if (row[w]) row[w][word] = bits[w];
}

}  // namespace

void fill_blocks(const FillBlocks& p, Device& device) {
  const int64_t words = words_of(p.height), counters = p.column_groups() * kCountersPerGroup;
  const int threads = device.max_threads < 128 ? device.max_threads : 128;
  launch(device, "fill_blocks", fill_blocks_kernel,
         static_cast<unsigned>(ceil_div(p.chunks * counters * words, threads)), threads, 0, p,
         words, counters, threshold(1.0));
}

void fill_planes(const FillPlanes& p, Device& device) {
  const int64_t words = words_of(p.cols);
  const int threads = device.max_threads < 128 ? device.max_threads : 128;
  launch(device, "fill_planes", fill_planes_kernel,
         static_cast<unsigned>(ceil_div(p.rows * words, threads)), threads, 0, p, words);
}

}  // namespace cuda
}  // namespace randlora
