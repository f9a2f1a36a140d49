// Generation: bit planes of any slice of a seed's infinite ternary matrix (docs/basis-spec.md).
//
//   planes[s][q][w] bit b: element (role, row_start + q, col_start + 64w + b) is +1 (s = 0), -1 (1)
//
// One thread makes one word of both planes: it walks the 16 counters of a group of 64 columns, and
// each counter gives four bits. Sharing a group between 16 threads would need the same compares,
// and ballots in addition. The words of a warp lie side by side, so its stores coalesce. If a slice
// starts inside a group, each of its words needs two groups, and its thread computes both.
//
// Floor: one Philox call per four elements, 2 bits written per element. Integer arithmetic
// dominates.
#include "../../core/ternary_spec.h"
#include "../device/launch.h"
#include "../kernels.h"

namespace randlora::cuda {
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

}  // namespace

void fill_planes(const FillPlanes& p, Device& device) {
  const int64_t words = words_of(p.cols);
  const int threads = min(128, device.max_threads);
  launch(device, "fill_planes", fill_planes_kernel, ceil_div(p.rows * words, threads), threads, 0,
         p, words);
}

const void* some_kernel() { return reinterpret_cast<const void*>(fill_planes_kernel); }

}  // namespace randlora::cuda
