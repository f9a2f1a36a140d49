// The last step of the adjoint of delta_weight from lists (delta_lists_backward.cu). It adds the
// parts of Z[j][p, i], one per tile of rows of G, and contracts Z to
//   dlam[j, i] = scale * sum over p of A[j, k] gam[i, k] Z[j][p, i],  k = S_j[p]
//   dgam[i, k] = scale * sum over j of A[j, k] lam[j, i] Z[j][p, i]
// Every sum belongs to one warp, or to one block that adds its warps' sums in order.
#pragma once
#include <algorithm>

#include "../../core/operators.h"
#include "../device/launch.h"
#include "../device/list_blocks.h"

namespace randlora {
namespace cuda {
namespace {

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

constexpr int kColumns = 8;  // columns of dgam per warp: a 32-byte sector in fp32
constexpr int kBases = 32;   // one per lane

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
    // A lane finds the entries of its rank index in these columns; then the warp goes through all
    // entries in order.
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

template <class C, class Index>
void contract(const DeltaWeightBackward& p, const Lists<Index>& a, const C* Z, int64_t tiles,
              Device& device) {
  const Basis& b = p.basis;
  const int threads = std::min(device.max_threads, 128), warps = threads / 32;
  const int64_t across = ceil_div(b.n, kBases);
  const int64_t blocks = b.r * across + ceil_div(ceil_div(b.d, kColumns) * across, warps);
  const Contract<C, Index> work{b.r,
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
         threads, warps * kColumns * (kBases + 1) * int64_t{sizeof(C)}, work);
}

}  // namespace
}  // namespace cuda
}  // namespace randlora
