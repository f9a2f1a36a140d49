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
//   contract   two kinds of blocks: dlam, for one rank index and 32 bases; dgam, a warp per 8
//              columns and 32 bases. A lane is a base i, so Z is read in its own order.
//
// Floor: G is read once (34 MB at 4096 x 4096 in 16 bits); density^2 D K d additions (17 million at
// density 1/64). Gathering from G without the transpose would read a 32-byte sector per element.
//
// Scratch: G^T as large as G, and (D / 4096) n nnz(A) sums.
#include <algorithm>

#include "../../core/stochastic.h"
#include "../device/element.h"
#include "../device/list_blocks.h"
#include "delta_contract.h"
#include "delta_weight.h"
#include "transpose_used.h"

namespace randlora {
namespace cuda {
namespace {

template <class S>
constexpr int kGroup = 16 / int(sizeof(S));  // positions a block takes
constexpr int kTeam = 8;                     // lanes that share a column of B
constexpr int kAhead = 4;                    // entries of the column that a lane takes at a time

// Groups of positions before rank index j, with room for a partial group in each.
template <int Group, class Index>
__device__ __forceinline__ int64_t groups_before(const Lists<Index>& a, int64_t j) {
  return (a.plus(j) + j * (Group - 1)) / Group;
}

template <int Group, class Index>
__device__ __forceinline__ int64_t rank_of_group(const Lists<Index>& a, int64_t r, int64_t g) {
  int started = 0;
#pragma unroll 1
  for (int64_t j = threadIdx.x % 32; j < r; j += 32) started += groups_before<Group>(a, j) <= g;
#pragma unroll
  for (int step = 16; step != 0; step /= 2) started += __shfl_xor_sync(kWarp, started, step);
  return started - 1;
}

// sum += sign * (the elements of 16 bytes)
template <int N, class C>
__device__ __forceinline__ void add_words(C (&sum)[N], C sign, uint4 words, bf16) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int u = 0; u < 4; ++u) {  // a bf16 is the upper half of a float
    sum[2 * u] += sign * float_of_bits(w[u] << 16);
    sum[2 * u + 1] += sign * float_of_bits(w[u] & 0xffff0000u);
  }
}
template <int N, class C, class S>
__device__ __forceinline__ void add_words(C (&sum)[N], C sign, uint4 words, S) {
  S v[N];
  memcpy(v, &words, 16);
#pragma unroll
  for (int u = 0; u < N; ++u) sum[u] += sign * widen(v[u]);
}

// Sums over the team's lanes. Lane l returns the sum of position l / (kTeam / N).
template <int N, class C>
__device__ __forceinline__ C team_sum(C (&sum)[N]) {
  const int lane = threadIdx.x % kTeam;
#pragma unroll
  for (int step = kTeam / 2, width = N / 2; step != 0; step /= 2, width /= 2) {
    const bool upper = lane & step;
    if (width == 0) sum[0] += __shfl_xor_sync(kWarp, sum[0], step);
#pragma unroll
    for (int v = 0; v < width; ++v) {
      const C send = upper ? sum[v] : sum[v + width], keep = upper ? sum[v + width] : sum[v];
      sum[v] = keep + __shfl_xor_sync(kWarp, send, step);
    }
  }
  return sum[0];
}

// tile[o] = element o of each column; zero for columns past `here`. `in_words` says that columns of
// 16-bit elements are aligned to 4 bytes, so that rows can be loaded in pairs.
template <int N, class S>
__device__ __forceinline__ void fill_tile(const S* const (&column)[N], int here, int height,
                                          bool in_words, uint4* tile) {
  int o = threadIdx.x;
  if constexpr (sizeof(S) == 2) {
    for (int pair = o; in_words && pair < height / 2; pair += blockDim.x) {
      uint32_t w[N], low[N / 2], high[N / 2];
#pragma unroll
      for (int u = 0; u < N; ++u)
        w[u] = u < here ? reinterpret_cast<const uint32_t*>(column[u])[pair] : 0;
#pragma unroll
      for (int u = 0; u < N; u += 2) {
        low[u / 2] = (w[u] & 0xffffu) | w[u + 1] << 16;
        high[u / 2] = w[u] >> 16 | (w[u + 1] & 0xffff0000u);
      }
      tile[2 * pair] = make_uint4(low[0], low[1], low[2], low[3]);
      tile[2 * pair + 1] = make_uint4(high[0], high[1], high[2], high[3]);
    }
    if (in_words) o += height / 2 * 2;
  }
  for (; o < height; o += blockDim.x) {
    S v[N] = {};
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (u < here) v[u] = column[u][o];
    uint4 words;
    memcpy(&words, v, 16);
    tile[o] = words;
  }
}

// Adds the first `pluses` of the `count` tile rows in `list` to sum and subtracts the others. A
// lane takes every kTeam-th row; past the end it takes the row of zeros, `rows`.
template <int N, class Index, class C, class S>
__device__ __forceinline__ void add_rows(const Index* list, int count, int pluses, int64_t o0,
                                         int rows, const uint4* tile, C (&sum)[N], S) {
  const int lane = threadIdx.x % kTeam;
  const Index* at = list + lane;
  const int first = static_cast<int>(o0), none = first + rows;
  for (int e = lane; e < count; e += kTeam * kAhead, at += kTeam * kAhead) {
    int o[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      o[u] = e + u * kTeam < count ? static_cast<int>(at[u * kTeam]) : none;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      add_words(sum, e + u * kTeam < pluses ? C(1) : C(-1), tile[o[u] - first], S{});
  }
}

// Z[t][x][i] sums over the rows o of tile t, for entry x of A's lists and base i.
template <class S, class Index>
__global__ void gather_kernel(const S* GT, int64_t D, int64_t r, int64_t n, Lists<Index> a,
                              Lists<Index> b_cols, int rows, unsigned tiles, bool in_words,
                              int64_t positions, typename ComputeOf<S>::type* Z) {
  using C = typename ComputeOf<S>::type;
  constexpr int N = kGroup<S>;
  // (rows + 1), N positions each; the last row is zero.
  uint4* tile = reinterpret_cast<uint4*>(shared_memory());
  const unsigned group = blockIdx.x / tiles, t = blockIdx.x % tiles;
  const int64_t j = rank_of_group<N>(a, r, group);
  const int64_t x0 = a.plus(j) + (group - groups_before<N>(a, j)) * N;
  if (x0 >= a.end(j)) return;  // an unused group
  const int here = static_cast<int>(min(a.end(j) - x0, int64_t{N}));

  const int64_t o0 = int64_t{t} * rows;
  const int height = static_cast<int>(min(D - o0, int64_t{rows}));
  const S* column[N];
#pragma unroll
  for (int u = 0; u < N; ++u) column[u] = GT + (u < here ? a.index[x0 + u] : 0) * D + o0;
  fill_tile<N>(column, here, height, in_words, tile);
  if (threadIdx.x == 0) tile[rows] = make_uint4(0, 0, 0, 0);
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
      add_rows(b_cols.index + plus, pluses + minuses, pluses, o0, rows, tile, sum, S{});
    } else {
      add_rows(b_cols.index + plus, pluses, pluses, o0, rows, tile, sum, S{});
      add_rows(b_cols.index + minus, minuses, 0, o0, rows, tile, sum, S{});
    }
    const C z = team_sum(sum);
    constexpr int kCopies = kTeam / N;  // lanes that end with the same sum
    const int u = lane / kCopies;
    if (i < n && u < here && lane % kCopies == 0) Z[(t * positions + x0 + u) * n + i] = z;
  }
}

constexpr int64_t kGatherBytes = 64 << 10;  // 4096 rows: three blocks fit an SM with 227 KB

template <class S, class Index>
void delta_weight_backward_as(const DeltaWeightBackward& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  const Basis& b = p.basis;
  const Lists<Index> a = b.a.as<Index>();
  const S* GT = static_cast<const S*>(p.grad);
  if (!p.transposed) GT = transpose_used(GT, b.D, b.d, a, b.r, device);
  constexpr int64_t kRow = sizeof(uint4);  // and one more row, of zeros
  const int64_t most = std::min(device.shared_bytes - kRow, kGatherBytes) / kRow / 2 * 2;
  const int64_t tiles = ceil_div(b.D, most), rows = ceil_div(ceil_div(b.D, tiles), 2) * 2;
  const bool in_words = b.D % 2 == 0 && reinterpret_cast<uintptr_t>(GT) % 4 == 0;
  C* Z = scratch<C>(device, tiles * b.a.count * b.n);
  const int64_t groups = (b.a.count + b.r * (kGroup<S> - 1)) / kGroup<S>;
  launch(device, "delta_weight_gather", gather_kernel<S, Index>,
         static_cast<unsigned>(groups * tiles), std::min(device.max_threads, 256),
         (rows + 1) * kRow, GT, b.D, b.r, b.n, a, b.b_cols.as<Index>(), rows, tiles, in_words,
         b.a.count, Z);

  contract(p, a, Z, tiles, device);
}

}  // namespace

void delta_weight_backward_lists(const DeltaWeightBackward& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    p.basis.wide ? delta_weight_backward_as<S, uint32_t>(p, device)
                 : delta_weight_backward_as<S, uint16_t>(p, device);
  });
}

}  // namespace cuda
}  // namespace randlora
