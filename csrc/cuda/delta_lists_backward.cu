// The adjoint of dW = scale * B @ A' from lists: G (D, d), or (d, D) when transposed, to
//   Z[j][p, i]  = sum over o of B[o, (j, i)] G[o, k],      k = S_j[p]
//   dlam[j, i]  = scale * sum over p of A[j, k] gam[i, k] Z[j][p, i]
//   dgam[i, k]  = scale * sum over j of A[j, k] lam[j, i] Z[j][p, i]
// with Z only where A is not zero, and no sum split between threads that might finish in any order.
//
//   transpose  G^T of the columns k that some S_j has, so that a column is contiguous. (G transposed
//              is that already.)
//   gather     a block takes 16 bytes' worth of the positions of one S_j (8 in 16 bits) and up to 4096
//              rows of G: those columns lie in shared memory side by side, so that one 16-byte load
//              serves 8 sums. Eight lanes share a column (j, i) of B: they walk its list, which is
//              contiguous, and add up what they have by exchanges that leave each lane one of the 8.
//   contract   blocks of two kinds: dlam, a rank index and 32 bases each; dgam, a warp to 8 columns and
//              32 bases. A lane is a base i, so that Z is read as it lies.
//
// 4096 x 4096, bf16, density 1/64, r = 32 on an H100: nnz(A) = 2048 positions, Z of 262,144 sums of 64
// terms each, 16.8 million additions, the byte floor 34 MB: 10 us.
//   transpose  reads 34 MB and writes the 39 percent of the columns that are used, 13 MB: 14 us, less
//              where G is still in L2
//   gather     290 blocks read 17 MB of G^T and 19 MB of lists from L2 (7 us at 5.5 TB/s), and walk 37,000
//              lists of 64: per eight lanes 8 loads of 16 bytes at random banks, some 8 cycles for a
//              quarter warp's worth of four lists: 22,000 instructions an SM, 8 us
//   contract   4 MB: 3 us, latency
// About 25 us in all with launches; transposed 12. Gathering from G as it lies would read a 32-byte
// sector for every element of S_j in every row, 268 MB of L2 traffic: 49 us in place of 14 + 7.
#include <algorithm>

#include "../core/stochastic.h"
#include "delta_weight.h"
#include "element.h"
#include "launch.h"
#include "list_blocks.h"

namespace randlora {
namespace cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;

// ---- transpose -----------------------------------------------------------------------------------

constexpr int kSide = 64;  // of a tile
constexpr int kTiles = 4;  // a block takes, one below the other
template <class S>         // of a row of a tile: odd in 32-bit words
constexpr int kTileStride = kSide + (sizeof(S) == 2 ? 2 : 1);

// Bit b: column k0 + b is in some S_j. Every warp finds out for itself, a lane to a rank index.
template <class Index>
__device__ uint64_t used_columns(const Lists<Index>& a, int64_t r, int64_t k0) {
  uint64_t used = 0;
  for (int64_t j = threadIdx.x % 32; j < r; j += 32) {
    const int64_t run[3] = {a.plus(j), a.minus(j), a.end(j)};
#pragma unroll
    for (int s = 0; s < 2; ++s)
      for (int64_t x = lower_bound(a.index, run[s], run[s + 1], k0);
           x < run[s + 1] && a.index[x] < k0 + kSide; ++x)
        used |= uint64_t{1} << (a.index[x] - k0);
  }
#pragma unroll
  for (int step = 16; step != 0; step /= 2) used |= __shfl_xor_sync(kWarp, used, step);
  return used;
}

// out (d, D): rows k that are used.
template <class S, class Index>
__global__ void transpose_kernel(const S* in, int64_t D, int64_t d, Lists<Index> a, int64_t r,
                                 int64_t across, bool aligned, S* out) {
  constexpr int N = 16 / int(sizeof(S)), kStride = kTileStride<S>;
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kSide columns, kStride)
  const int64_t k0 = blockIdx.x % across * kSide;
  const int cols = static_cast<int>(min(d - k0, int64_t{kSide}));
  const uint64_t used = used_columns(a, r, k0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 0; step < kTiles; ++step) {
    const int64_t o0 = (blockIdx.x / across * kTiles + step) * kSide;
    if (o0 >= D) break;
    const int rows = static_cast<int>(min(D - o0, int64_t{kSide}));
    if (aligned) {
      for (int e = threadIdx.x; e < kSide * kSide / N; e += blockDim.x) {
        const int row = e / (kSide / N), k = e % (kSide / N) * N;
        if (row >= rows || k >= cols) continue;
        const uint4 words = *reinterpret_cast<const uint4*>(in + (o0 + row) * d + k0 + k);
        S v[N];
        memcpy(v, &words, 16);
#pragma unroll
        for (int u = 0; u < N; ++u) tile[(k + u) * kStride + row] = v[u];
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

// ---- gather --------------------------------------------------------------------------------------

template <class S>
constexpr int kGroup = 16 / int(sizeof(S));  // positions a block takes
constexpr int kTeam = 8;                     // lanes that share a column of B
constexpr int kAhead = 4;                    // entries of it that a lane takes at a time

// Groups of positions before rank index j, with room for a part group in each.
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
  for (int u = 0; u < 4; ++u) {  // in place, the upper half is a float but for the lower one's bits
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

// Sums over the team's lanes; lane l keeps that of position l / (kTeam / N), returned.
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

// tile[o] = element o of each column; zero for those past `here`. Rows of 16-bit elements are loaded in
// pairs where `in_words` says that the columns are aligned for it.
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

// sum += the rows of the tile that a part of a list names, the first `pluses` of `count`, minus the others.
// A lane takes every kTeam-th; past the end it takes the row of zeros, `rows`.
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

// Z[t][x][i]: of rows o in tile t, for entry x of A's lists and base i.
template <class S, class Index>
__global__ void gather_kernel(const S* GT, int64_t D, int64_t r, int64_t n, Lists<Index> a,
                              Lists<Index> b_cols, int rows, unsigned tiles, bool in_words,
                              int64_t positions, typename ComputeOf<S>::type* Z) {
  using C = typename ComputeOf<S>::type;
  constexpr int N = kGroup<S>;
  uint4* tile =
      reinterpret_cast<uint4*>(shared_memory());  // (rows + 1): N positions each; zeros at the end
  const unsigned group = blockIdx.x / tiles, t = blockIdx.x % tiles;
  const int64_t j = rank_of_group<N>(a, r, group);
  const int64_t x0 = a.plus(j) + (group - groups_before<N>(a, j)) * N;
  if (x0 >= a.end(j)) return;  // the room was not needed
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
    // The runs lie one behind the other, but for what belongs to other tiles.
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

// ---- contract ------------------------------------------------------------------------------------

template <class C, class Index>
struct Contract {
  int64_t r, n, d, tiles, positions;
  Lists<Index> a;
  const C *lam, *gam, *Z;
  C scale, *dlam, *dgam;

  __device__ __forceinline__ C z(int64_t x, int64_t i) const {
    C sum = C(0);
    for (int64_t t = 0; t < tiles; ++t) sum += Z[(t * positions + x) * n + i];
    return sum;
  }
};

constexpr int kColumns = 8;  // of dgam that a warp makes: a 32-byte sector in fp32
constexpr int kBases = 32;   // a lane each

template <class C, class Index>
__device__ void contract_lam(const Contract<C, Index>& p, int64_t j, int64_t i) {
  C* partial = reinterpret_cast<C*>(shared_memory());  // (warps, kBases)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  C sum = C(0);
  if (i < p.n)
#pragma unroll 4
    for (int64_t x = p.a.plus(j) + warp; x < p.a.end(j); x += warps) {
      const C g = p.gam[i * p.d + p.a.index[x]] * p.z(x, i);
      sum += x < p.a.minus(j) ? g : -g;
    }
  partial[warp * kBases + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= p.n) return;
  for (int w = 1; w < warps; ++w) sum += partial[w * kBases + lane];
  p.dlam[j * p.n + i] = p.scale * sum;
}

// Columns k0 .. k0 + kColumns, bases i0 .. i0 + kBases.
template <class C, class Index>
__device__ void contract_gam(const Contract<C, Index>& p, int64_t k0, int64_t i0) {
  constexpr int kStride = kBases + 1;
  const int lane = threadIdx.x % 32;
  C* sum = reinterpret_cast<C*>(shared_memory()) + threadIdx.x / 32 * kColumns * kStride;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sum[k * kStride + lane] = C(0);
  const int64_t i = i0 + lane;
  for (int64_t j0 = 0; j0 < p.r; j0 += 32) {
    // A lane finds the entries of its rank index in these columns; then all go through them in order.
    const bool there = j0 + lane < p.r;
    const int64_t j = there ? j0 + lane : 0;
    const int64_t run[3] = {p.a.plus(j), p.a.minus(j), p.a.end(j)};
    int64_t first[2], last[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      first[s] = lower_bound(p.a.index, run[s], run[s + 1], k0);
      last[s] = lower_bound(p.a.index, first[s], run[s + 1], k0 + kColumns);
    }
    const bool any = there && (first[0] < last[0] || first[1] < last[1]);
    for (unsigned left = __ballot_sync(kWarp, any); left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const C lam = i < p.n ? p.lam[(j0 + source) * p.n + i] : C(0);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t end = __shfl_sync(kWarp, last[s], source);
        for (int64_t x = __shfl_sync(kWarp, first[s], source); x < end; ++x) {
          const int k = static_cast<int>(p.a.index[x] - k0);
          const C product = i < p.n ? lam * p.z(x, i) : C(0);
          sum[k * kStride + lane] += s == 0 ? product : -product;
        }
      }
    }
  }
  __syncwarp();
  const int64_t k = k0 + lane % kColumns;
  for (int e = lane / kColumns; e < kBases; e += 32 / kColumns)
    if (i0 + e < p.n && k < p.d)
      p.dgam[(i0 + e) * p.d + k] = p.scale * sum[lane % kColumns * kStride + e];
}

template <class C, class Index>
__global__ void contract_kernel(Contract<C, Index> p) {
  const int64_t across = (p.n + kBases - 1) / kBases, block = blockIdx.x;
  if (block < p.r * across)
    return contract_lam(p, block / across, block % across * kBases + threadIdx.x % 32);
  const int64_t task = (block - p.r * across) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t k0 = task / across * kColumns;
  if (k0 < p.d) contract_gam(p, k0, task % across * kBases);
}

// ---- host ----------------------------------------------------------------------------------------

constexpr int64_t kGatherBytes = 64 << 10;  // 4096 rows: three blocks an SM of an H100

template <class S, class Index>
void delta_weight_backward_as(const DeltaWeightBackward& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  const Basis& b = p.basis;
  const Lists<Index> a = b.a.as<Index>();
  const S* GT = static_cast<const S*>(p.grad);
  if (!p.transposed) {
    S* turned = scratch<S>(device, b.D * b.d);
    const int64_t across = ceil_div(b.d, kSide), down = ceil_div(b.D, kSide * kTiles);
    const bool aligned = reinterpret_cast<uintptr_t>(p.grad) % 16 == 0 && b.d * sizeof(S) % 16 == 0;
    launch(device, "delta_weight_transpose", transpose_kernel<S, Index>,
           static_cast<unsigned>(across * down), std::min(device.max_threads, 256),
           kSide * kTileStride<S> * int64_t{sizeof(S)}, GT, b.D, b.d, a, b.r, across, aligned,
           turned);
    GT = turned;
  }
  const int64_t most = std::min(device.shared_bytes, kGatherBytes) / int64_t{sizeof(uint4)} / 2 * 2;
  const int64_t tiles = ceil_div(b.D, most), rows = ceil_div(ceil_div(b.D, tiles), 2) * 2;
  const bool in_words = b.D % 2 == 0 && reinterpret_cast<uintptr_t>(GT) % 4 == 0;
  C* Z = scratch<C>(device, tiles * b.a.count * b.n);
  const int64_t groups = (b.a.count + b.r * (kGroup<S> - 1)) / kGroup<S>;
  launch(device, "delta_weight_gather", gather_kernel<S, Index>,
         static_cast<unsigned>(groups * tiles), std::min(device.max_threads, 256),
         (rows + 1) * int64_t{sizeof(uint4)}, GT, b.D, b.r, b.n, a, b.b_cols.as<Index>(), rows,
         tiles, in_words, b.a.count, Z);

  const int threads = std::min(device.max_threads, 128), warps = threads / 32;
  const int64_t across = ceil_div(b.n, kBases);
  const int64_t blocks = b.r * across + ceil_div(ceil_div(b.d, kColumns) * across, warps);
  const Contract<C, Index> contract{b.r,
                                    b.n,
                                    b.d,
                                    tiles,
                                    b.a.count,
                                    a,
                                    static_cast<const C*>(p.lam),
                                    static_cast<const C*>(p.gam),
                                    Z,
                                    static_cast<C>(p.scale),
                                    static_cast<C*>(p.dlam),
                                    static_cast<C*>(p.dgam)};
  launch(device, "delta_weight_contract", contract_kernel<C, Index>, static_cast<unsigned>(blocks),
         threads, warps * kColumns * (kBases + 1) * int64_t{sizeof(C)}, contract);
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
