// A'[c, k] = lam[j, i] * A[j, k] * gam[i, k], with c = j * n + i (PEFT's UniqueBaseGrad). Its
// gradients:
//
//   dlam[j, i] = sum over k of grad A gam
//   dgam[i, k] = sum over j of grad A lam
//
// A, lam and gam are dense factors here, as on the CPU: a zero times infinity is NaN.
//
// Forward. A thread holds four rows of A in 16 bytes' worth of columns and walks eight copies: 32
// rows of A' for four reads of A and eight of gam. Reading both for each row would take 8 bytes
// from L2 for every 2 written. A thread walks fewer copies if eight would leave multiprocessors
// idle.
//
// Backward. A warp takes one copy i, 16 bytes' worth of columns a lane and up to 32 rows j. It
// reads their grad once, four rows at a time. dgam adds up in the lanes' registers. For
// dlam each lane stores one number per row in shared memory, and lane j adds up those of row j: two
// shared accesses a row instead of five shuffles. If a row is wider than a warp's columns, or r
// is over 32, a second kernel adds partial sums from scratch in order: no atomics,
// the same result every time.
//
// Floor: A' written once (forward) or grad read once (backward), 34 MB each at 4096 x 4096 in bf16;
// two multiplications per element forward, three backward. Memory dominates both.
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../device/rounded_store.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

constexpr int kRows = 4;    // rows of A per thread, forward
constexpr int kCopies = 8;  // most copies per thread, forward

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void scaled_basis_kernel(int64_t r, int64_t n, int64_t d, const C* __restrict__ A,
                                    const C* __restrict__ lam, const C* __restrict__ gam,
                                    S* __restrict__ out, int64_t col_blocks, int64_t copy_blocks,
                                    int64_t copies) {
  constexpr int kWidth = kPerAccess<S>;
  const int64_t rest = blockIdx.x / col_blocks;
  const int64_t first_i = rest % copy_blocks * copies, first_j = rest / copy_blocks * kRows;
  const int rows = static_cast<int>(min(int64_t{kRows}, r - first_j));
  const Columns<kWidth, Aligned> c(blockIdx.x % col_blocks * blockDim.x * kWidth, threadIdx.x, d);
  Pack<C, kWidth> a[kRows];
#pragma unroll
  for (int q = 0; q < kRows; ++q)
    if (q < rows) a[q] = c.load(A + (first_j + q) * d);
#pragma unroll 1
  for (int64_t i = first_i; i < min(n, first_i + copies); ++i) {
    const Pack<C, kWidth> g = c.load(gam + i * d);
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      if (q >= rows) break;
      const int64_t row = (first_j + q) * n + i;
      const C l = lam[row];
      Pack<S, kWidth> x = {};
#pragma unroll
      for (int v = 0; v < kWidth; ++v) x.set(v, narrow<S>(l * a[q].get(v) * g.get(v)));
      c.store(out + row * d, x);
    }
  }
}

constexpr int kBatch = 32;       // most rows of grad per warp, backward
constexpr int kAhead = 4;        // rows loaded at a time
constexpr int kStride = 32 + 1;  // numbers between two rows in shared memory: no bank conflicts

template <class C>
RANDLORA_HD int64_t shared_of_warp() {
  return int64_t{kBatch} * kStride * int64_t{sizeof(C)};
}

// dlam: (parts, r, n), a sum per part of the columns; dgam: (batches, n, d), per batch of rows.
template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void scaled_basis_backward_kernel(int64_t r, int64_t n, int64_t d,
                                             const C* __restrict__ A, const C* __restrict__ lam,
                                             const C* __restrict__ gam, const S* __restrict__ grad,
                                             C* __restrict__ dlam, C* __restrict__ dgam,
                                             int64_t parts, int64_t copy_blocks) {
  constexpr int kWidth = kPerAccess<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto* of_lane = reinterpret_cast<C*>(shared_memory() + warp * shared_of_warp<C>());
  const int64_t part = blockIdx.x % parts, rest = blockIdx.x / parts;
  const int64_t i = rest % copy_blocks * warps + warp;  // neighbours share A in L1
  if (i >= n) return;
  const int64_t batch = rest / copy_blocks, first_j = batch * kBatch;
  const int rows = static_cast<int>(min(int64_t{kBatch}, r - first_j));
  const Columns<kWidth, Aligned> c(part * 32 * kWidth, lane, d);
  const Pack<C, kWidth> g = c.load(gam + i * d);
  C dg[kWidth] = {};
  for (int first = 0; first < rows; first += kAhead) {
    Pack<S, kWidth> G[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q)
      G[q] = c.load(grad + ((first_j + min(first + q, rows - 1)) * n + i) * d);
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      if (first + q >= rows) break;
      const int64_t j = first_j + first + q;
      const Pack<C, kWidth> a = c.load(A + j * d);
      const C l = lam[j * n + i];
      C sum = 0;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const C GA = widen(G[q].get(v)) * a.get(v);
        sum += GA * g.get(v);
        dg[v] += GA * l;
      }
      of_lane[(first + q) * kStride + lane] = sum;
    }
  }
  Pack<C, kWidth> x = {};
#pragma unroll
  for (int v = 0; v < kWidth; ++v) x.set(v, dg[v]);
  c.store(dgam + (batch * n + i) * d, x);
  __syncwarp();
  if (lane >= rows) return;
  C sum = 0;
#pragma unroll 8
  for (int l = 0; l < 32; ++l) sum += of_lane[lane * kStride + l];
  dlam[(part * r + first_j + lane) * n + i] = sum;
}

}  // namespace

void scaled_basis(const ScaledBasis& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr int kWidth = kPerAccess<S>;
    const int64_t col_warps = ceil_div(p.d, 32 * kWidth), row_blocks = ceil_div(p.r, kRows);
    const int64_t threads =
        std::clamp<int64_t>(32 * col_warps, 32, std::min(128, device.max_threads));
    const int64_t col_blocks = ceil_div(p.d, threads * kWidth);
    // Threads walk several copies only if every multiprocessor still has eight warps.
    const int64_t warps = col_warps * row_blocks * p.n;  // with one copy each
    const int64_t copies = std::clamp<int64_t>(warps / (8 * device.multiprocessors), 1, kCopies);
    const int64_t copy_blocks = ceil_div(p.n, copies);
    const auto kernel = aligned_rows(p.d, kWidth, p.A, p.gam, p.out)
                            ? scaled_basis_kernel<S, true, C>
                            : scaled_basis_kernel<S, false, C>;
    launch(device, "scaled_basis", kernel, col_blocks * copy_blocks * row_blocks,
           static_cast<int>(threads), 0, p.r, p.n, p.d, p.A, p.lam, p.gam, p.out, col_blocks,
           copy_blocks, copies);
  });
}

void scaled_basis_backward(const ScaledBasisBackward& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    constexpr int kWidth = kPerAccess<S>;
    const int threads = std::min(128, device.max_threads), warps = threads / 32;
    const int64_t K = p.r * p.n, copy_blocks = ceil_div(p.n, warps);
    const int64_t parts = ceil_div(p.d, 32 * kWidth), batches = ceil_div(p.r, kBatch);
    C *dlam = static_cast<C*>(p.dlam), *dgam = static_cast<C*>(p.dgam);
    C* dlam_parts = parts > 1 ? scratch<C>(device, parts * K) : dlam;
    C* dgam_parts = batches > 1 ? scratch<C>(device, batches * p.n * p.d) : dgam;
    const auto kernel = aligned_rows(p.d, kWidth, p.A, p.gam, p.grad, p.dgam)
                            ? scaled_basis_backward_kernel<S, true, C>
                            : scaled_basis_backward_kernel<S, false, C>;
    launch(device, "scaled_basis_backward", kernel, parts * copy_blocks * batches, threads,
           warps * shared_of_warp<C>(), p.r, p.n, p.d, p.A, p.lam, p.gam, p.grad, dlam_parts,
           dgam_parts, parts, copy_blocks);
    if (parts > 1) sum_parts<C>(dlam_parts, parts, K, {dlam, nullptr, C(1)}, device);
    if (batches > 1) sum_parts<C>(dgam_parts, batches, p.n * p.d, {dgam, nullptr, C(1)}, device);
  });
}

}  // namespace randlora::cuda
