// out (T, d) = scale * U (T, K) A' [+ out], one rank index at a time (a_side.h):
//
//   out[t, k_p] += sum_i G'[p, i] U[t, (j, i)]        p in S_j,  G' = scale lam G
//
// dense products whose results scatter over columns. A block owns tokens x a range of columns, whose
// sums it holds in shared memory in fp32, and walks j: the entries of S_j in its range are a run,
// found by Support::before. A stage of the pipeline holds U of one j (128 bases of it in 16 bits) and
// some entries' values; it is fetched two stages ahead by cp.async. Within a stage every column
// belongs to one warp, and there is a barrier between stages: no atomics, and j in ascending order.
// `out` is read and written once, by rows.
//
// U is read once for every range of columns and the values once for every tile of tokens, so the tile
// follows from shared memory M: U traffic falls with 1 / range, that of the values with 1 / tokens.
// At low density the values are small: 32 tokens, and as many columns as fit.
//
// 4096 x 4096, r = 32, n = 128, T = 8192, bf16 on an H100 (M = 227 KB):
//                      density 1/64             1/3
//   tile               32 x 1376                64 x 464
//   operations         4.3 GFLOP, 4 us          92 GFLOP, 93 us at 989 TFLOP/s
//   DRAM               134 MB (U, out), 40 us; 60 us when out is read
//   L2 into SMs        200 + 134 MB, 61 us      600 + 1430 MB, 370 us at 5.5 TB/s
//   adds to shared     17 M                     358 M, 200 us with bank conflicts
// At 1/64 a stage is short (2 to 4 units of 8 k-steps, some 600 cycles), one a j: 190 of them an SM, 70 us.
// 80 us expected at 1/64, 400 us at 1/3, where the delta path is the better choice.
#include "a_side.h"

namespace randlora {
namespace cuda {
namespace {

// A unit of work, which a warp does at a time: 16 MI entries x 8 NI tokens.
template <class S, int MI, int NI, bool Tf32>
struct Down {
  using Tile = WarpTile<S, MI, NI, Tf32>;
  using C = typename Tile::C;
  static constexpr int kTokens = MI == 1 ? 32 : 64, kEntries = kTokens;
  static constexpr int kBases = 256 / sizeof(S);
  static constexpr int kStride = kBases + kPerAccess<S>;
  static constexpr int kStages = 3;
  static constexpr int64_t kStageBytes =
      int64_t{kStages} * (kTokens + kEntries) * kStride * sizeof(S);

  static int64_t shared(int64_t range) { return kStageBytes + range * kTokens * sizeof(C); }
  // Where the sum of a column and token lies: tokens turned about by the column, so that neither a row
  // nor a column of sums lies in one bank.
  static __device__ __forceinline__ int at(int column, int token) {
    return column * kTokens + (token ^ (column & 31));
  }
};

// What a stage holds: `count` entries from `entry` on, all of one j, and bases from i0 on; U of them
// in its own ring of buffers, as several stages in a row may share it. count = 0: there is no more.
struct Stage {
  int64_t entry, i0;
  int count, u_buffer;
};

template <class S, int MI, int NI, bool Tf32>
__global__ void __launch_bounds__(256, 1)
    down_kernel(Support a, const S* __restrict__ values, const S* __restrict__ U, int64_t T,
                int range, bool u_aligned, S* __restrict__ out, bool accumulate, bool out_aligned) {
  using B = Down<S, MI, NI, Tf32>;
  using C = typename B::C;
  using Tile = typename B::Tile;
  constexpr int L = kPerAccess<S>, kPieces = B::kBases / L;
  S* u_shared = reinterpret_cast<S*>(shared_memory());               // (kStages, kTokens, kStride)
  S* v_shared = u_shared + B::kStages * B::kTokens * B::kStride;     // (kStages, kEntries, kStride)
  C* sums = reinterpret_cast<C*>(shared_memory() + B::kStageBytes);  // (range, kTokens), by B::at
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const int64_t ranges = ceil_div(a.d, range);
  const int64_t k0 = blockIdx.x % ranges * range, k1 = min(a.d, k0 + range);
  const int64_t t0 = blockIdx.x / ranges * B::kTokens;
  const int columns = static_cast<int>(k1 - k0),
            tokens = static_cast<int>(min(T - t0, int64_t{B::kTokens}));

  // The next stage: entries [at, end) of j are left for bases from i0 on. The bounds of the j after
  // that are fetched ahead.
  int64_t j = -1, i0 = a.n;
  int low = 0, at = 0, end = 0, next_low = a.before(0, k0), next_end = a.before(0, k1);
  int u_buffer = B::kStages - 1;
  // A thread copies the same piece of rows that lie `row_step` apart.
  const int first_row = threadIdx.x / kPieces, row_step = blockDim.x / kPieces;
  const int base = threadIdx.x % kPieces * L;
  const auto load = [&](int v_buffer) -> Stage {
    const bool fresh = at == end;
    if (fresh) {
      i0 += B::kBases;
      while (i0 >= a.n || low == end) {
        low = next_low, end = next_end, i0 = 0;
        if (++j >= a.r) {
          low = at = end, i0 = a.n;  // and so it stays
          cp_async_commit();
          return {0, 0, 0, 0};
        }
        if (j + 1 < a.r) next_low = a.before(j + 1, k0), next_end = a.before(j + 1, k1);
      }
      at = low;
      u_buffer = u_buffer == B::kStages - 1 ? 0 : u_buffer + 1;
    }
    const Stage stage{a.first(j) + at, i0, min(end - at, B::kEntries), u_buffer};
    at += stage.count;
    // Up to the end of the k-step: zeros on both sides past n. Rows that are not there stay as they
    // are, for they reach no result.
    const int64_t left = a.n - i0;
    const int depth = left < B::kBases ? static_cast<int>((left + 15) / 16 * 16) : B::kBases;
    if (base < depth) {
      const bool there = i0 + base < a.bases;
      S* to = v_shared + (v_buffer * B::kEntries + first_row) * B::kStride + base;
      const S* from = there ? values + (stage.entry + first_row) * a.bases + i0 + base : values;
      const int64_t step = there ? row_step * a.bases : 0;
      for (int row = first_row; row < stage.count; row += row_step) {
        cp_async16(to, from, there ? 16 : 0);
        to += row_step * B::kStride, from += step;
      }
    }
    if (fresh && u_aligned && base < depth) {
      const bool there = base < left;
      S* to = u_shared + (u_buffer * B::kTokens + first_row) * B::kStride + base;
      const S* from = there ? U + ((t0 + first_row) * a.r + j) * a.n + i0 + base : U;
      const int64_t step = there ? row_step * a.r * a.n : 0;
      for (int row = first_row; row < tokens; row += row_step) {
        cp_async16(to, from, there ? 16 : 0);
        to += row_step * B::kStride, from += step;
      }
    } else if (fresh && !u_aligned) {
      S* u = u_shared + u_buffer * B::kTokens * B::kStride;
      const S* from = U + (t0 * a.r + j) * a.n + i0;
      for (int x = threadIdx.x; x < tokens * B::kBases; x += blockDim.x) {
        const int row = x / B::kBases, i = x % B::kBases;
        if (i < depth) u[row * B::kStride + i] = i < left ? from[row * a.r * a.n + i] : S{};
      }
    }
    cp_async_commit();
    return stage;
  };

  const auto use = [&](const Stage& stage, int v_buffer) {
    constexpr int kAcross = B::kTokens / (8 * NI);
    const int depth = static_cast<int>(min(a.n - stage.i0, int64_t{B::kBases}));
    const int units = (stage.count + 16 * MI - 1) / (16 * MI) * kAcross;
    for (int unit = warp; unit < units; unit += warps) {
      const int p0 = unit / kAcross * 16 * MI, t = unit % kAcross * 8 * NI;
      int32_t code[MI][2];
#pragma unroll
      for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int p = p0 + Tile::row(m, 2 * h);
          code[m][h] = p < stage.count ? a.entry[stage.entry + p] : -1;
        }
      const S* v = v_shared + (v_buffer * B::kEntries + p0) * B::kStride;
      const S* u = u_shared + (stage.u_buffer * B::kTokens + t) * B::kStride;
      Tile tile;
      tile.zero();
#pragma unroll 2
      for (int i = 0; i < depth; i += Tile::kStep)
        tile.template step<Order::by_line, Order::by_line>(v + i, B::kStride, u + i, B::kStride);
#pragma unroll
      for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (code[m][e / 2] < 0) continue;
          const int column = static_cast<int>(code[m][e / 2] / 2 - k0);
#pragma unroll
          for (int n = 0; n < NI; ++n)
            sums[B::at(column, t + Tile::col(n, e))] += tile.acc[m][n][e];
        }
    }
  };

  for (int x = threadIdx.x; x < columns * B::kTokens; x += blockDim.x) sums[x] = 0;
  Stage now = load(0), next = load(1);
  for (int buffer = 0; now.count > 0;) {
    cp_async_wait<B::kStages - 2>();
    __syncthreads();
    const Stage after = load(buffer == 0 ? B::kStages - 1 : buffer - 1);
    use(now, buffer);
    buffer = buffer == B::kStages - 1 ? 0 : buffer + 1;
    now = next, next = after;
  }
  __syncthreads();

  if (out_aligned) {
    // A warp stores L tokens x 32 / L packs, which lie in different banks of `sums`. What `out` holds is
    // read for several of them before the first is stored: the store orders memory.
    constexpr int kAcross = 32 / L, kAtOnce = 4;
    const int lane = threadIdx.x % 32, across = (columns / L + kAcross - 1) / kAcross;
    const int tiles = across * (B::kTokens / L);
    for (int first = warp; first < tiles; first += kAtOnce * warps) {
      S* to[kAtOnce];
      Pack<S, L> pack[kAtOnce];
      int column[kAtOnce], token[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int x = first + u * warps;
        column[u] = (x % across * kAcross + lane % kAcross) * L;
        token[u] = x / across * L + lane / kAcross;
        const bool there = x < tiles && token[u] < tokens && column[u] < columns;
        to[u] = there ? out + (t0 + token[u]) * a.d + k0 + column[u] : nullptr;
        pack[u] = {};
        if (there && accumulate) pack[u] = *reinterpret_cast<const Pack<S, L>*>(to[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (!to[u]) continue;
#pragma unroll
        for (int e = 0; e < L; ++e) {
          const C sum = sums[B::at(column[u] + e, token[u])];
          pack[u].set(e, narrow<S>(accumulate ? widen(pack[u].get(e)) + sum : sum));
        }
        pack[u].store(to[u]);
      }
    }
  } else {
    for (int x = threadIdx.x; x < tokens * columns; x += blockDim.x) {
      const int t = x / columns, c = x % columns;
      S* to = out + (t0 + t) * a.d + k0 + c;
      const C sum = sums[B::at(c, t)];
      *to = narrow<S>(accumulate ? widen(*to) + sum : sum);
    }
  }
}

}  // namespace

void gathered_down(const Gathered& g, const void* U, int64_t T, void* out, bool accumulate,
                   Device& device) {
  const Support& a = g.support;
  with_engine(g.dtype, device, [&](auto storage, auto tf32) {
    using S = decltype(storage);
    constexpr bool kTf32 = decltype(tf32)::value;
    const auto start = [&](auto kernel, auto shape) {
      using B = decltype(shape);
      const int64_t token_tiles = ceil_div(T, B::kTokens);
      const int64_t room = (device.shared_bytes - B::kStageBytes) /
                           (B::kTokens * int64_t{sizeof(typename B::C)}) / 16 * 16;
      // As wide as fits, but with a block for every SM, down to 64 columns.
      const int64_t ranges =
          max(ceil_div(a.d, room),
              min(ceil_div(device.multiprocessors, token_tiles), ceil_div(a.d, 64)));
      const int64_t range = ceil_div(ceil_div(a.d, ranges), 16) * 16;
      launch(device, "gathered_down", kernel,
             dim3(static_cast<unsigned>(token_tiles * ceil_div(a.d, range))),
             min(256, device.max_threads), B::shared(range), a, g.values, U, T, range,
             aligned_rows(a.n, kPerAccess<S>, U), out, accumulate,
             aligned_rows(a.d, kPerAccess<S>, out));
    };
    if constexpr (sizeof(S) < 8) {
      // The larger unit where a j has many entries in a range: density over 1/16 or so. A stage is
      // eight of them, one a warp.
      using Dense = Down<S, 2, 2, kTf32>;
      if (T > 32 && 16 * a.count > a.r * a.d && Dense::shared(64) <= device.shared_bytes)
        return start(down_kernel<S, 2, 2, kTf32>, Dense{});
    }
    start(down_kernel<S, 1, 2, kTf32>, Down<S, 1, 2, kTf32>{});
  });
}

void ASideCall::down(const void* U, int64_t T, void* out, bool accumulate) {
  if (T == 0 || (few(T) && down_few(U, T, out, accumulate))) return;
  gathered_down({support(), values(true), p_.dtype}, U, T, out, accumulate, device_);
}

void a_down(const ASide& p, const void* U, void* out, double scale, bool accumulate,
            Device& device) {
  ASideCall(p, scale, device).down(U, p.T, out, accumulate);
}

}  // namespace cuda
}  // namespace randlora
