// The adjoint of dW = scale * B @ A' from lists. Reduces G (D, d), or (d, D) if transposed, to
//   Z[j][p, i]  = sum over o of B[o, (j, i)] G[o, k],      k = S_j[p]
//   dlam[j, i]  = scale * sum over p of A[j, k] gam[i, k] Z[j][p, i]
//   dgam[i, k]  = scale * sum over j of A[j, k] lam[j, i] Z[j][p, i]
// Z exists only where A is not zero. Every sum has a fixed order.
//
//   transpose  makes G^T for the columns k that appear in some S_j, so that a column is contiguous.
//              If transposed, G already is G^T.
//   gather     a block takes 16 bytes' worth of positions of one S_j (8 in 16 bits) and up to 4096
//              rows of G. Those columns lie side by side in shared memory, so one 16-byte load
//              serves 8 sums. Eight lanes share a column (j, i) of B: they walk its contiguous
//              list, then exchange sums until each lane holds one of the 8.
//   contract   is that of the factored path (a_grad.cu); its P is Z
//
// Floor: G is read once (34 MB at 4096 x 4096 in 16 bits); density^2 D K d additions (17 million at
// density 1/64). Gathering from G without the transpose would read a 32-byte sector per element.
//
// Scratch: G^T as large as G, and (D / 4096) n nnz(A) sums.
#include <algorithm>

#include "../factored/a_side.h"

namespace randlora::cuda {
namespace {

// ---- transpose: the columns that some S_j has, 39 percent at density 1/64 and r = 32 -----------

constexpr int kSide = 64;  // of a tile
constexpr int kTiles = 4;  // tiles per block, one below the other
template <class S>         // between rows of a tile; odd in 32-bit words
constexpr int kTileStride = kSide + (sizeof(S) == 2 ? 2 : 1);

// Bit b: column k0 + b is in some S_j. Every warp computes it; a lane has columns 32 apart.
__device__ __forceinline__ uint64_t used_columns(const Support& a, int64_t k0) {
  const int64_t low = k0 + threadIdx.x % 32, high = low + 32;
  bool use_low = false, use_high = false;
#pragma unroll 4
  for (int64_t j = 0; j < a.r; ++j) {
    use_low |= low < a.d && a.at[j * a.d + low] >= 0;
    use_high |= high < a.d && a.at[j * a.d + high] >= 0;
  }
  return uint64_t{__ballot_sync(kWarp, use_high)} << 32 | __ballot_sync(kWarp, use_low);
}

// out (d, D): rows k that are used.
template <class S>
__global__ void transpose_kernel(const S* in, int64_t D, Support a, int64_t across, bool aligned,
                                 S* out) {
  const int64_t d = a.d;
  constexpr int N = kPerAccess<S>, kStride = kTileStride<S>;
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kSide columns, kStride)
  const int64_t k0 = blockIdx.x % across * kSide;
  const int cols = static_cast<int>(min(d - k0, int64_t{kSide}));
  const uint64_t used = used_columns(a, k0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 0; step < kTiles; ++step) {
    const int64_t o0 = (blockIdx.x / across * kTiles + step) * kSide;
    if (o0 >= D) break;
    const int rows = static_cast<int>(min(D - o0, int64_t{kSide}));
    if (aligned) {
      for (int e = threadIdx.x; e < kSide * kSide / N; e += blockDim.x) {
        const int row = e / (kSide / N), k = e % (kSide / N) * N;
        if (row >= rows || k >= cols) continue;
        const auto pack = *reinterpret_cast<const Pack<S, N>*>(in + (o0 + row) * d + k0 + k);
#pragma unroll
        for (int u = 0; u < N; ++u) tile[(k + u) * kStride + row] = pack.get(u);
      }
    } else {
      for (int e = threadIdx.x; e < kSide * kSide; e += blockDim.x) {
        const int row = e / kSide, k = e % kSide;
        if (row < rows && k < cols) tile[k * kStride + row] = in[(o0 + row) * d + k0 + k];
      }
    }
    __syncthreads();
    for (int k = warp; k < cols; k += warps)
      if (used >> k & 1)
        for (int row = lane; row < rows; row += 32)
          out[(k0 + k) * D + o0 + row] = tile[k * kStride + row];
    __syncthreads();
  }
}

// Transposes `in` from (D, d) to (d, D). If no S_j contains column k, row k of the result is unset.
template <class S>
const S* transpose_used(const S* in, int64_t D, const Support& a, Device& device) {
  S* out = scratch<S>(device, D * a.d);
  const int64_t across = ceil_div(a.d, kSide), down = ceil_div(D, kSide * kTiles);
  launch(device, "delta_weight_transpose", transpose_kernel<S>, across * down,
         std::min(device.max_threads, 256), kSide * kTileStride<S> * int64_t{sizeof(S)}, in, D, a,
         across, aligned_rows(a.d, kPerAccess<S>, in), out);
  return out;
}

// ---- gather -------------------------------------------------------------------------------------

constexpr int kTeam = 8;   // lanes that share a column of B
constexpr int kAhead = 4;  // entries of it that a lane takes at a time

// tile[o] = element o of each column; zero for columns past `here`. `in_words` says that columns of
// 16-bit elements are aligned to 4 bytes, so that rows can be loaded in pairs.
template <int N, class S>
__device__ __forceinline__ void fill_tile(const S* const (&column)[N], int here, int height,
                                          bool in_words, Pack<S, N>* tile) {
  int o = threadIdx.x;
  if constexpr (sizeof(S) == 2) {
    for (int pair = o; in_words && pair < height / 2; pair += blockDim.x) {
      uint32_t w[N];
      Pack<S, N> low, high;
#pragma unroll
      for (int u = 0; u < N; ++u)
        w[u] = u < here ? reinterpret_cast<const uint32_t*>(column[u])[pair] : 0;
#pragma unroll
      for (int u = 0; u < N; u += 2) {
        low.word[u / 2] = (w[u] & 0xffffu) | w[u + 1] << 16;
        high.word[u / 2] = w[u] >> 16 | (w[u + 1] & 0xffff0000u);
      }
      tile[2 * pair] = low, tile[2 * pair + 1] = high;
    }
    if (in_words) o += height / 2 * 2;
  }
  for (; o < height; o += blockDim.x) {
    Pack<S, N> row = {};
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (u < here) row.set(u, column[u][o]);
    tile[o] = row;
  }
}

// Adds the first `pluses` of the `count` tile rows in `list` to sum and subtracts the others. A
// lane takes every kTeam-th row; past the end it takes the row of zeros, `rows`.
template <int N, class Index, class C, class S>
__device__ __forceinline__ void add_rows(const Index* list, int count, int pluses, int64_t o0,
                                         int rows, const Pack<S, N>* tile, C (&sum)[N]) {
  const int lane = threadIdx.x % kTeam;
  const Index* at = list + lane;
  const int first = static_cast<int>(o0), none = first + rows;
  for (int e = lane; e < count; e += kTeam * kAhead, at += kTeam * kAhead) {
    int o[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      o[u] = e + u * kTeam < count ? static_cast<int>(at[u * kTeam]) : none;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const C sign = e + u * kTeam < pluses ? C(1) : C(-1);
      const Pack<S, N> row = tile[o[u] - first];
#pragma unroll
      for (int v = 0; v < N; ++v) sum[v] += sign * widen(row.get(v));
    }
  }
}

// Z (tiles, room, bases): Z[t][e][i] sums over the rows o of tile t, for entry e of A and base i.
template <class S, class Index>
__global__ void gather_kernel(const S* GT, int64_t D, Support a, Lists<Index> b_cols, int rows,
                              unsigned tiles, bool in_words, ComputeOf<S>* Z) {
  using C = ComputeOf<S>;
  constexpr int N = kPerAccess<S>;  // positions of S_j that a block takes
  // (rows + 1), N positions each; the last row is zero.
  auto* tile = reinterpret_cast<Pack<S, N>*>(shared_memory());
  const unsigned group = blockIdx.x / tiles, t = blockIdx.x % tiles;
  const int64_t j = line_of_tile(a.offset, a.r, group, N);
  const int64_t p0 = (group - first_tile(a.offset, j, N)) * N, e0 = a.first(j) + p0, n = a.n;
  if (p0 >= a.size(j)) return;  // an unused group
  const int here = static_cast<int>(min(a.size(j) - p0, int64_t{N}));

  const int64_t o0 = int64_t{t} * rows;
  const int height = static_cast<int>(min(D - o0, int64_t{rows}));
  const S* column[N];
#pragma unroll
  for (int u = 0; u < N; ++u) column[u] = GT + (u < here ? a.entry[e0 + u] / 2 : 0) * D + o0;
  fill_tile<N>(column, here, height, in_words, tile);
  if (threadIdx.x == 0) tile[rows] = {};
  __syncthreads();

  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = threadIdx.x % 32 / kTeam, lane = threadIdx.x % kTeam;
  constexpr int kTeams = 32 / kTeam;
  for (int64_t i0 = warp * kTeams; i0 < n; i0 += warps * kTeams) {
    const int64_t i = i0 + team, c = j * n + min(i, n - 1);
    int64_t plus = b_cols.plus(c), minus = b_cols.minus(c), end = b_cols.end(c), plus_end = minus;
    if (tiles > 1) {  // four lanes find where the tile's rows begin and end in either run
      const bool second = lane & 2;
      const int64_t found = lower_bound(b_cols.index, second ? minus : plus, second ? end : minus,
                                        lane & 1 ? o0 + rows : o0);
      plus = __shfl_sync(kWarp, found, 0, kTeam);
      plus_end = __shfl_sync(kWarp, found, 1, kTeam);
      minus = __shfl_sync(kWarp, found, 2, kTeam);
      end = __shfl_sync(kWarp, found, 3, kTeam);
    }
    // With one tile the two runs are adjacent; with more, other tiles' rows lie between them.
    const int pluses = static_cast<int>(plus_end - plus), minuses = static_cast<int>(end - minus);
    C sum[N] = {};
    if (tiles == 1) {
      add_rows(b_cols.index + plus, pluses + minuses, pluses, o0, rows, tile, sum);
    } else {
      add_rows(b_cols.index + plus, pluses, pluses, o0, rows, tile, sum);
      add_rows(b_cols.index + minus, minuses, 0, o0, rows, tile, sum);
    }
    const C z = warp_sums<N, 1, kTeam>(sum);
    constexpr int kCopies = kTeam / N;  // lanes that end with the same sum
    const int u = lane / kCopies;
    if (i < n && u < here && lane % kCopies == 0) Z[(t * a.room() + e0 + u) * a.bases + i] = z;
  }
}

constexpr int64_t kGatherBytes = 64 << 10;  // 4096 rows: three blocks fit an SM with 227 KB

}  // namespace

void delta_weight_backward_lists(const DeltaWeightBackward& p, Device& device) {
  const Basis& b = p.basis;
  ASideCall call({b, p.lam, p.gam, p.dtype, 0}, p.scale, device);
  const Support& a = call.support();
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const S* GT = static_cast<const S*>(p.grad);
    if (!p.transposed) GT = transpose_used(GT, b.D, a, device);
    constexpr int64_t kRow = 16;  // and one more row, of zeros
    const int64_t most = std::min(device.shared_bytes - kRow, kGatherBytes) / kRow / 2 * 2;
    const int64_t tiles = ceil_div(b.D, most), rows = ceil_div(ceil_div(b.D, tiles), 2) * 2;
    const bool in_words = b.D % 2 == 0 && reinterpret_cast<uintptr_t>(GT) % 4 == 0;
    C* Z = scratch<C>(device, tiles * a.room() * a.bases);
    b.b_cols.typed([&](auto b_cols) {
      launch(device, "delta_weight_gather", gather_kernel<S, typename decltype(b_cols)::Index>,
             most_tiles(a.count, a.r, kPerAccess<S>) * tiles, std::min(device.max_threads, 256),
             (rows + 1) * kRow, GT, b.D, a, b_cols, rows, tiles, in_words, Z);
    });
    call.contract(Z, tiles, p.dlam, p.dgam, false);
  });
}

}  // namespace randlora::cuda
