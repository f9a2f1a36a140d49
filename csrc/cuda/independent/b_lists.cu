// The B side of independent bases from sorted sign-split lists, one kernel for both directions:
//
//   up     y[t, o] = sum_c B[o, c] V[t, c] [+ y]     lines are the rows of B, over K
//   down   U[t, c] = sum_o B[o, c] x[t, o]           lines are its columns, over D
//
// A block takes a tile of tokens and a range of lines. It stages its tokens' operand once in shared
// memory, transposed to (features, tokens), so that gathers cause no L2 traffic. A warp takes a
// line; a lane takes some of its entries and 16 bytes of tokens. Lanes sum in the compute type, and
// the warp adds their sums at the end. The warp fetches the next line's positions while it sums
// this one. Results of 4 lines a warp are collected in shared memory and stored by rows. Nothing is
// summed between warps: deterministic.
//
//   T = 1          lanes are entries; the operand is not staged
//   T > 1          tiles of 8 or 16 tokens in 16 bits, 4 or 8 in fp32, 2 or 4 in fp64
//   no room        (many features, or a small card) token panels of the operand are read from L2
//
// Floor: the lists (2 bytes per non-zero element), operand and result once; T nnz(B) additions.
#include "../device/columns.h"
#include "../device/launch.h"
#include "../kernels.h"
#include "panels.h"

namespace randlora::cuda {
namespace {

// Lines of a warp between two barriers. One token makes few blocks, so each should be short.
constexpr int lines_of_warp(int tokens) { return tokens == 1 ? 1 : 4; }

// A tile of `Tokens`: a lane has kLaneTokens of them, kAcross lanes have all.
template <class S, int Tokens>
struct TokenTile {
  static constexpr int kLines = lines_of_warp(Tokens);
  static constexpr int kLaneTokens = Tokens == 1 ? 1 : kPerAccess<S>,
                       kAcross = Tokens / kLaneTokens;
  static constexpr int kEntries = 32 / kAcross;        // per step of the warp
  static constexpr int kAhead = kAcross == 2 ? 6 : 3;  // steps whose positions are fetched ahead
  static constexpr int kOut =
      Tokens * kLines < 32 ? 1 : Tokens * kLines / 32;  // results a thread stores
};

struct Sizes {
  int64_t lines, features, T, range;  // range: lines per block, a multiple of its warps' lines
};

// Blocks that a multiprocessor must hold, which bounds registers: on Blackwell a bound of 64
// spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResident = 2;
#else
constexpr int kResident = 4;
#endif

// Source: the operand (T, features) if it is staged or has one token, else token panels of width
// Tokens.
template <class S, int Tokens, bool Staged>
__global__ void __launch_bounds__(256, kResident)
    sum_lists(Lists lists, Sizes sizes, const S* __restrict__ source, S* __restrict__ out,
              bool accumulate) {
  using Tile = TokenTile<S, Tokens>;
  using C = ComputeOf<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  constexpr int kLines = Tile::kLines;
  const int chunk = kLines * warps, stride = chunk + 1;
  S* staged = reinterpret_cast<S*>(shared_memory());  // (features, Tokens)
  C* results =
      reinterpret_cast<C*>(shared_memory() + (Staged ? sizes.features * Tokens * sizeof(S) : 0));
  // (2, Tokens, stride)
  const int64_t ranges = ceil_div(sizes.lines, sizes.range);
  const int64_t first = blockIdx.x % ranges * sizes.range, tile = blockIdx.x / ranges;
  const int64_t last = min(sizes.lines, first + sizes.range), t0 = tile * Tokens;
  const S* rows = Staged ? staged : source + tile * sizes.features * Tokens;

  if constexpr (Staged) {
    // Tokens past T repeat the last one and are not stored: unconditional loads overlap.
    for (int64_t f = threadIdx.x; f < sizes.features; f += blockDim.x) {
      S value[Tokens];
#pragma unroll
      for (int t = 0; t < Tokens; ++t)
        value[t] = source[min(t0 + t, sizes.T - 1) * sizes.features + f];
      Pack<S, Tokens> row = {};
#pragma unroll
      for (int t = 0; t < Tokens; ++t) row.set(t, value[t]);
      reinterpret_cast<Pack<S, Tokens>*>(staged)[f] = row;
    }
    __syncthreads();
  }

  const int slot = lane / Tile::kAcross;
  rows += lane % Tile::kAcross * Tile::kLaneTokens;
  C sum[Tile::kLaneTokens] = {};
  const auto add = [&](uint16_t position, C sign) {
    if constexpr (Tokens == 1) {
      sum[0] += sign * widen(rows[position]);
    } else {
      using Run = Pack<S, Tile::kLaneTokens>;
      const Run tokens = *reinterpret_cast<const Run*>(rows + int64_t{position} * Tokens);
#pragma unroll
      for (int t = 0; t < Tile::kLaneTokens; ++t) sum[t] += sign * widen(tokens.get(t));
    }
  };

  // Lane l gets offset[2 q + l], where q is the warp's first line of chunk c. Lines past the last
  // are empty.
  const auto offsets = [&](int64_t c) {
    return lists.offset[min(2 * (first + c * chunk + warp * kLines) + lane, 2 * last)];
  };
  const auto of_lane = [&](auto x, int l) { return __shfl_sync(kWarp, x, l); };
  uint16_t ahead[Tile::kAhead];
  const auto fetch = [&](const uint16_t* line, int count) {
#pragma unroll
    for (int s = 0; s < Tile::kAhead; ++s)
      ahead[s] = s * Tile::kEntries < count - slot ? line[s * Tile::kEntries + slot] : uint16_t(0);
  };

  int64_t origin = of_lane(offsets(0), 0);  // of the warp's first line; `offset` counts from it
  int offset = static_cast<int>(offsets(0) - origin);
  fetch(lists.index + origin, of_lane(offset, 2));
  const int64_t chunks = ceil_div(last - first, chunk);
  for (int64_t c = 0; c < chunks; ++c) {
    C* result = results + c % 2 * Tokens * stride;
    const int64_t q0 = first + c * chunk;
    S old[Tile::kOut] = {};
    const auto each_result = [&](const auto& fn) {
#pragma unroll
      for (int u = 0; u < Tile::kOut; ++u) {
        const int x = threadIdx.x + u * blockDim.x, t = x / chunk, q = x % chunk;
        if (t < Tokens && t0 + t < sizes.T && q0 + q < last)
          fn(u, result + t * stride + q, out + (t0 + t) * sizes.lines + q0 + q);
      }
    };
    if (accumulate) each_result([&](int u, C*, S* to) { old[u] = *to; });

    const int64_t next = offsets(c + 1), next_origin = of_lane(next, 0);
    const int next_offset = static_cast<int>(next - next_origin);
#pragma unroll
    for (int q = 0; q < kLines; ++q) {
      const int begin = of_lane(offset, 2 * q), end = of_lane(offset, 2 * q + 2);
      const int plus = of_lane(offset, 2 * q + 1) - begin, count = end - begin;
      const uint16_t* line = lists.index + origin + begin;
      uint16_t position[Tile::kAhead];
#pragma unroll
      for (int s = 0; s < Tile::kAhead; ++s) position[s] = ahead[s];
      if (q + 1 < kLines)
        fetch(line + count, of_lane(offset, 2 * q + 4) - end);
      else
        fetch(lists.index + next_origin, of_lane(next_offset, 2));

#pragma unroll
      for (int t = 0; t < Tile::kLaneTokens; ++t) sum[t] = 0;
      int p = slot;
#pragma unroll
      for (int s = 0; s < Tile::kAhead; ++s, p += Tile::kEntries)
        if (p < count) add(position[s], p < plus ? C(1) : C(-1));
#pragma unroll 4
      for (; p < count; p += Tile::kEntries) add(line[p], p < plus ? C(1) : C(-1));

      constexpr int kHolders = 32 / Tile::kLaneTokens;
      const C total = warp_sums<Tile::kLaneTokens, Tile::kAcross>(sum);
      if (lane % kHolders < Tile::kAcross)
        result[(lane % kHolders * Tile::kLaneTokens + lane / kHolders) * stride + warp * kLines +
               q] = total;
    }
    __syncthreads();
    each_result([&](int u, C* from, S* to) {
      *to = narrow<S>(accumulate ? widen(old[u]) + *from : *from);
    });
    origin = next_origin, offset = next_offset;
  }
}

}  // namespace

void b_lists(const BSide& p, Device& device) {
  const TernaryBases& b = p.basis;
  const int64_t T = p.T, lines = p.up ? b.D : b.K(), features = p.up ? b.K() : b.D;
  if (T == 0) return;
  const int threads = min(256, device.max_threads);
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr int kWidth = kPerAccess<S>;
    const auto chunk_of = [&](int tokens) { return lines_of_warp(tokens) * threads / 32; };
    const auto results = [&](int tokens) {
      return 2 * tokens * (chunk_of(tokens) + 1) * int64_t{sizeof(C)};
    };
    const auto staged = [&](int tokens) { return features * tokens * int64_t{sizeof(S)}; };
    const auto fits = [&](int tokens) {
      return staged(tokens) + results(tokens) <= device.shared_bytes;
    };

    const auto start = [&](auto kernel, int tokens, bool stages, int blocks_an_sm) {
      const int64_t tiles = ceil_div(T, tokens), chunk = chunk_of(tokens);
      const int64_t ranges =
          min(ceil_div(lines, chunk), ceil_div(blocks_an_sm * device.multiprocessors, tiles));
      Sizes sizes;
      sizes.lines = lines;
      sizes.features = features;
      sizes.T = T;
      sizes.range = ceil_div(ceil_div(lines, ranges), chunk) * chunk;
      const void* source = p.from;
      if (tokens > 1 && !stages) {
        const Panels panels = make_panels(T, features, tokens, p.dtype, device);
        fill_panels(p.from, T, panels, p.dtype, device);
        source = panels.data;
      }
      launch(device, "b_lists", kernel, tiles * ceil_div(lines, sizes.range), threads,
             (stages ? staged(tokens) : 0) + results(tokens), p.up ? b.b_rows : b.b_cols, sizes,
             source, p.to, p.accumulate);
    };
    if (T == 1) return start(sum_lists<S, 1, false>, 1, false, 4);
    if (T > kWidth && fits(2 * kWidth))
      return start(sum_lists<S, 2 * kWidth, true>, 2 * kWidth, true, 1);
    if (fits(kWidth)) return start(sum_lists<S, kWidth, true>, kWidth, true, 2);
    start(sum_lists<S, 2 * kWidth, false>, 2 * kWidth, false, 4);
  });
}

}  // namespace randlora::cuda
