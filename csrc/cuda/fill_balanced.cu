// Generation of a balanced matrix (docs/balanced-spec.md), packed by group (core/balanced.h).
//
//   draw_keys   thread (line, 4 groups): a Philox call gives their keys
//   choose      block g: for every line, whether fewer than q groups come before g by key; how many
//   place       block g: gives these lines their places, ascending, and draws their signs
//
// 14336 lines, r = 32, q = 4, n = 128 on an H100: 0.12 M Philox calls for the keys and 0.06 M for the
// signs, under 1 us; choose reads 1.8 MB of keys 32 times, from L2: 59 MB, 11 us at 5.5 TB/s. But a
// block for each of 32 groups leaves 100 SMs idle, and walks 56 times 256 lines: about 60 us of latency
// for choose and 60 for place. It runs once per basis.
#include "../core/balanced_spec.h"
#include "kernels.h"
#include "launch.h"

namespace randlora {
namespace cuda {
namespace {

// key (r, lines)
__global__ void draw_keys(FillBalanced p, uint32_t* __restrict__ key) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t line = x % p.lines, g0 = x / p.lines * 4;
  if (g0 >= p.r) return;
#pragma unroll
  for (int v = 0; v < 4; ++v)  // of one Philox call
    if (g0 + v < p.r)
      key[(g0 + v) * p.lines + line] =
          support_key(p.seed, p.role, static_cast<uint32_t>(p.line_start + line),
                      static_cast<uint32_t>(g0 + v));
}

// Sums over the block of a value that is the same for all lanes of a warp; `shared` has one for each.
__device__ __forceinline__ int64_t sum_of_warps(int64_t value, int64_t* shared) {
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += shared[w];
  return sum;
}

// chosen (r, lines); count (r)
__global__ void choose(FillBalanced p, const uint32_t* __restrict__ key, uint8_t* chosen,
                       int64_t* count) {
  const int64_t g = blockIdx.x;
  int64_t found = 0;
  for (int64_t first = 0; first < p.lines; first += blockDim.x) {
    const int64_t line = first + threadIdx.x;
    bool is_in = false;
    if (line < p.lines) {
      const uint32_t mine = key[g * p.lines + line];
      int64_t before = 0;
#pragma unroll 4
      for (int64_t other = 0; other < p.r; ++other) {
        const uint32_t its = key[other * p.lines + line];
        before += its < mine || (its == mine && other < g);
      }
      is_in = before < p.q;
      chosen[g * p.lines + line] = is_in;
    }
    found += __popc(__ballot_sync(0xffffffffu, is_in));
  }
  found = sum_of_warps(found, reinterpret_cast<int64_t*>(shared_memory()));
  if (threadIdx.x == 0) count[g] = found;
}

__device__ __forceinline__ void draw_signs(const FillBalanced& p, uint32_t line, uint32_t group,
                                           uint32_t* sign) {
  const int64_t words = sign_words_of(p.n);
  for (int64_t w = 0; w < words; w += 4) {
    const Counter4 drawn = sign_words(p.seed, p.role, line, group, static_cast<uint32_t>(w / 4));
#pragma unroll
    for (int v = 0; v < 4; ++v)
      if (w + v < words) sign[w + v] = drawn.v[v] & Balanced::present(p.n, w + v);
  }
}

__global__ void place(FillBalanced p, const uint8_t* __restrict__ chosen,
                      const int64_t* __restrict__ count) {
  int64_t* shared = reinterpret_cast<int64_t*>(shared_memory());  // one a warp, twice in turn
  const int64_t g = blockIdx.x, words = sign_words_of(p.n);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int64_t next = 0;  // place of the first entry that is to come
  for (int64_t other = 0; other < g; ++other) next += count[other];
  if (threadIdx.x == 0) {
    p.offset[g] = next;
    if (g == p.r - 1) p.offset[p.r] = next + count[g];
  }
  int64_t* turn = shared;
  for (int64_t first = 0; first < p.lines; first += blockDim.x) {
    const int64_t line = first + threadIdx.x;
    const bool is_in = line < p.lines && chosen[g * p.lines + line];
    const uint32_t in_warp = __ballot_sync(0xffffffffu, is_in);
    const int64_t all = sum_of_warps(__popc(in_warp), turn);
    if (is_in) {
      int64_t at = next + __popc(in_warp & ((1u << lane) - 1));
      for (int w = 0; w < warp; ++w) at += turn[w];
      if (p.wide)
        static_cast<uint32_t*>(p.row)[at] = static_cast<uint32_t>(line);
      else
        static_cast<uint16_t*>(p.row)[at] = static_cast<uint16_t>(line);
      draw_signs(p, static_cast<uint32_t>(p.line_start + line), static_cast<uint32_t>(g),
                 p.sign + at * words);
    }
    next += all;
    turn = turn == shared ? shared + warps : shared;  // some may still read the other
  }
}

}  // namespace

void fill_balanced(const FillBalanced& p, Device& device) {
  const int threads = min(256, device.max_threads);
  auto* key = scratch<uint32_t>(device, p.r * p.lines);
  auto* chosen = scratch<uint8_t>(device, p.r * p.lines);
  auto* count = scratch<int64_t>(device, p.r);
  const int64_t shared = threads / 32 * int64_t{sizeof(int64_t)};
  const dim3 groups(static_cast<unsigned>(p.r));
  launch(device, "draw_keys", draw_keys,
         dim3(static_cast<unsigned>(ceil_div(p.lines * ceil_div(p.r, 4), threads))), threads, 0, p,
         key);
  launch(device, "choose", choose, groups, threads, shared, p, key, chosen, count);
  launch(device, "place", place, groups, threads, 2 * shared, p, chosen, count);
}

}  // namespace cuda
}  // namespace randlora
