// out (T, d) = scale * U (T, K) A' [+ out], one rank index at a time (a_side.h):
//
//   out[t, k_p] += sum_i G'[p, i] U[t, (j, i)]        p in S_j,  G' = scale lam G
//
// Each j is a dense product whose results scatter over columns. A block owns some tokens and a
// range of columns, keeps their sums in shared memory in the compute type, and walks j. The entries
// of S_j in its range are consecutive (Support::before). The block takes them in chunks; each warp
// gets a tile of 16 MI entries x all tokens. A pipeline stage holds a slice of copies of one chunk:
// its values and U, copied two stages ahead by cp.async. After the last slice each warp adds its
// tile to the sums. Within a chunk a column belongs to one warp, and a barrier separates the
// chunks, so sums need no atomics and run in order of j. `out` is read and written once, by rows.
//
// Floor: 2 T n nnz(A) operations; U is read once per range of columns, the values once per tile of
// tokens, and `out` is written once.
#include <cmath>

#include "a_side.h"
#include "column_sums.h"

namespace randlora::cuda {
namespace {

// Tile shapes. A slice has kDepth copies; registers sum kFlush copies before they are flushed.
template <class S, int MI, int NI>
struct Down {
  using Tile = WarpTile<S, MI, NI>;
  using C = typename Tile::C;
  static constexpr int kTokens = 8 * NI, kLines = 16 * MI;  // of a warp's tile; a block has kTokens
  static constexpr int kDepth = (MI == 1 ? 128 : 64) / int(sizeof(S)),
                       kFlush = 256 / int(sizeof(S));
  static constexpr int kStride = kDepth + kPerAccess<S>;
  static constexpr int kStages = 3;

  using Sums = ColumnSums<S, kTokens>;

  static constexpr __host__ __device__ int64_t stage_bytes(int64_t chunk) {
    return kStages * (kTokens + chunk) * kStride * int64_t{sizeof(S)};
  }
  static constexpr __host__ __device__ int64_t shared(int64_t chunk, int64_t range) {
    return stage_bytes(chunk) + range * kTokens * int64_t{sizeof(C)};
  }
};

// A slice of a chunk: `count` entries from `entry` on, all of one j, and copies from i0 on.
// count = 0 marks the end.
struct Stage {
  int64_t entry, i0;
  int count;
};

template <class S, int MI, int NI>
__global__ void __launch_bounds__(256, 1)
    down_kernel(Support a, const S* __restrict__ values, const S* __restrict__ U, int64_t T,
                int range, int chunk, bool u_aligned, S* __restrict__ out, bool accumulate,
                bool out_aligned) {
  using Shape = Down<S, MI, NI>;
  using C = typename Shape::C;
  using Tile = typename Shape::Tile;
  constexpr int kWidth = kPerAccess<S>, kPieces = Shape::kDepth / kWidth;
  S* u_shared = reinterpret_cast<S*>(shared_memory());  // (kStages, kTokens, kStride)
  S* v_shared =
      u_shared + Shape::kStages * Shape::kTokens * Shape::kStride;  // (kStages, chunk, kStride)
  const typename Shape::Sums sums = {
      reinterpret_cast<C*>(shared_memory() + Shape::stage_bytes(chunk))};
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const int64_t ranges = ceil_div(a.d, range);
  const int64_t k0 = blockIdx.x % ranges * range, k1 = min(a.d, k0 + range);
  const int64_t t0 = blockIdx.x / ranges * Shape::kTokens;
  const int columns = static_cast<int>(k1 - k0),
            tokens = static_cast<int>(min(T - t0, int64_t{Shape::kTokens}));

  // The stage loaded last: copies i0 and up; entries of j from `at` on, before `end`. The bounds of
  // j + 1 are fetched ahead.
  int64_t j = -1, i0 = a.n;
  int at = 0, end = 0, next_low = a.before(0, k0), next_end = a.before(0, k1);
  // A thread copies the same piece of every row_step-th row.
  const int first_row = threadIdx.x / kPieces, row_step = blockDim.x / kPieces;
  const int copy = threadIdx.x % kPieces * kWidth;
  const auto load = [&](int buffer) -> Stage {
    i0 += Shape::kDepth;
    if (i0 >= a.n) {
      i0 = 0, at += chunk;
      while (at >= end) {
        if (++j >= a.r) {
          j = a.r, at = end, i0 = a.n;  // the end, for all later calls too
          cp_async_commit();
          return {0, 0, 0};
        }
        at = next_low, end = next_end;
        if (j + 1 < a.r) next_low = a.before(j + 1, k0), next_end = a.before(j + 1, k1);
      }
    }
    const Stage stage{a.first(j) + at, i0, min(end - at, chunk)};
    // Both operands are zero from n to the end of the k-step. Missing rows keep old data: they
    // reach no result.
    const int64_t left = a.n - i0;
    const int depth =
        left < Shape::kDepth ? static_cast<int>((left + 15) / 16 * 16) : Shape::kDepth;
    S* u_stage = u_shared + buffer * Shape::kTokens * Shape::kStride;
    if (copy < depth) {
      const bool there = i0 + copy < a.copies;
      S* to = v_shared + (buffer * chunk + first_row) * Shape::kStride + copy;
      const S* from = there ? values + (stage.entry + first_row) * a.copies + i0 + copy : values;
      const int64_t step = there ? row_step * a.copies : 0;
      for (int row = first_row; row < stage.count; row += row_step) {
        cp_async16(to, from, there ? 16 : 0);
        to += row_step * Shape::kStride, from += step;
      }
    }
    const S* u = U + (t0 * a.r + j) * a.n + i0;
    if (u_aligned && copy < depth) {
      const bool there = copy < left;
      const S* from = there ? u + first_row * a.r * a.n + copy : U;
      const int64_t step = there ? row_step * a.r * a.n : 0;
      for (int row = first_row; row < tokens; row += row_step) {
        cp_async16(u_stage + Shape::Sums::place_of_token(row) * Shape::kStride + copy, from,
                   there ? 16 : 0);
        from += step;
      }
    } else if (!u_aligned) {
      for (int x = threadIdx.x; x < tokens * Shape::kDepth; x += blockDim.x) {
        const int row = x / Shape::kDepth, i = x % Shape::kDepth;
        if (i < depth)
          u_stage[Shape::Sums::place_of_token(row) * Shape::kStride + i] =
              i < left ? u[row * a.r * a.n + i] : S{};
      }
    }
    cp_async_commit();
    return stage;
  };

  Tile tile;
  const int p0 = warp * Shape::kLines;  // the warp's first entry in a chunk
  const auto use = [&](const Stage& stage, int buffer) {
    if (p0 >= stage.count) return;
    const int depth = static_cast<int>(min(a.n - stage.i0, int64_t{Shape::kDepth}));
    const int64_t next = stage.i0 + Shape::kDepth;
    const bool flushes = next >= a.n || next % Shape::kFlush == 0;
    int column[MI][2];
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int p = p0 + Tile::row(m, 2 * h);
        column[m][h] =
            flushes && p < stage.count ? static_cast<int>(a.entry[stage.entry + p] / 2 - k0) : -1;
      }
    const S* v = v_shared + (buffer * chunk + p0) * Shape::kStride;
    const S* u = u_shared + buffer * Shape::kTokens * Shape::kStride;
    if (depth == Shape::kDepth) {
#pragma unroll
      for (int i = 0; i < Shape::kDepth; i += Tile::kStep)
        tile.template step<Order::by_line, Order::by_line>(v + i, Shape::kStride, u + i,
                                                           Shape::kStride);
    } else {
#pragma unroll 1
      for (int i = 0; i < depth; i += Tile::kStep)
        tile.template step<Order::by_line, Order::by_line>(v + i, Shape::kStride, u + i,
                                                           Shape::kStride);
    }
    if (!flushes) return;
    sums.add(tile, column);
    tile = {};
  };

  for (int x = threadIdx.x; x < columns * Shape::kTokens; x += blockDim.x) sums.sums[x] = 0;
  Stage now = load(0), next = load(1);
  for (int buffer = 0; now.count > 0;) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();
    const Stage after = load(buffer == 0 ? Shape::kStages - 1 : buffer - 1);
    use(now, buffer);
    buffer = buffer == Shape::kStages - 1 ? 0 : buffer + 1;
    now = next, next = after;
  }
  __syncthreads();

  if (out_aligned) {
    // A warp stores kWidth tokens x 32 / kWidth packs, which lie in different banks of `sums`. It
    // reads `out` for several packs before it stores the first, because no load may move above a
    // store.
    constexpr int kAcross = 32 / kWidth, kAtOnce = 4;
    const int lane = threadIdx.x % 32, across = (columns / kWidth + kAcross - 1) / kAcross;
    const int tiles = across * (Shape::kTokens / kWidth);
    for (int first = warp; first < tiles; first += kAtOnce * warps) {
      S* to[kAtOnce];
      Pack<S, kWidth> pack[kAtOnce];
      int column[kAtOnce], token[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int x = first + u * warps;
        column[u] = (x % across * kAcross + lane % kAcross) * kWidth;
        token[u] = x / across * kWidth + lane / kAcross;
        const bool there = x < tiles && token[u] < tokens && column[u] < columns;
        to[u] = there ? out + (t0 + token[u]) * a.d + k0 + column[u] : nullptr;
        pack[u] = {};
        if (there && accumulate) pack[u] = *reinterpret_cast<const Pack<S, kWidth>*>(to[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (!to[u]) continue;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const C sum = sums.at(column[u] + e, token[u]);
          pack[u].set(e, narrow<S>(accumulate ? widen(pack[u].get(e)) + sum : sum));
        }
        pack[u].store(to[u]);
      }
    }
  } else {
    for (int x = threadIdx.x; x < tokens * columns; x += blockDim.x) {
      const int t = x / columns, c = x % columns;
      S* to = out + (t0 + t) * a.d + k0 + c;
      const C sum = sums.at(c, t);
      *to = narrow<S>(accumulate ? widen(*to) + sum : sum);
    }
  }
}

// Entries of a chunk, and columns that fit beside its stages. A chunk should hold nearly all
// entries of a rank index in these columns (the mean plus three standard deviations), but no more:
// smaller chunks leave room for more columns.
struct TileSize {
  int64_t chunk, columns;
};

template <class Shape>
TileSize choose_tile(const Support& a, const Device& device, int warps) {
  for (int w = 1;; ++w) {
    const int64_t chunk = w * Shape::kLines, room = device.shared_bytes - Shape::stage_bytes(chunk);
    const int64_t columns = room / (Shape::kTokens * int64_t{sizeof(typename Shape::C)}) / 16 * 16;
    const double entries = double(a.count) / double(a.r * a.d) * double(min(columns, a.d));
    if (w == warps || entries + 3 * std::sqrt(entries) <= double(chunk)) return {chunk, columns};
  }
}

}  // namespace

void ASideCall::down(const void* U, int64_t T, void* out, bool accumulate) {
  if (T == 0) return;
  const Support& a = support();
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto start = [&](auto kernel, auto shape) {
      using Shape = decltype(shape);
      static_assert(Shape::shared(8 * Shape::kLines, 64) <= kLeastShared, "on every card");
      const int threads = min(256, device_.max_threads);
      const TileSize tile = choose_tile<Shape>(a, device_, threads / 32);
      // As wide as fits, but narrower (down to 64 columns) if SMs would be idle otherwise.
      const int64_t token_tiles = ceil_div(T, Shape::kTokens);
      const int64_t ranges =
          max(ceil_div(a.d, tile.columns),
              min(ceil_div(device_.multiprocessors, token_tiles), ceil_div(a.d, 64)));
      const int64_t range = ceil_div(ceil_div(a.d, ranges), 16) * 16;
      launch(device_, "a_down", kernel, token_tiles * ceil_div(a.d, range), threads,
             Shape::shared(tile.chunk, range), a, values(true), U, T, range, tile.chunk,
             aligned_rows(a.n, kPerAccess<S>, U), out, accumulate,
             aligned_rows(a.d, kPerAccess<S>, out));
    };
    if constexpr (sizeof(S) < 8) {
      // The larger tile if a j has many entries in a range: density above 1/16.
      if (T > 32 && 16 * a.count > a.r * a.d) return start(down_kernel<S, 2, 8>, Down<S, 2, 8>{});
    }
    start(down_kernel<S, 1, 4>, Down<S, 1, 4>{});
  });
}

}  // namespace randlora::cuda
