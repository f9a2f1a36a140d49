// What a step does with lambda and gamma before the class products, and with the gradients after
// them:
//
//   hadamard_signed_diagonals
//     signed_gam[i, k] = a_signs[k] gam[i, k], rounded to the class dtype
//     factors = lam[c] col_signs[c], in the order of Factors (transform.h)
//   hadamard_diagonal_gradients
//     dgam[i, k] = scale a_signs[k] class_gradient[m, i, k']
//     dlam[c] = scale col_signs[c] * sum over q of sums[q, c]
//   add_slots
//     dlam alone, of several experts
//
// Floor: 1 / r of the layer's weight read and written, so what counts is that each is one launch.
#include <algorithm>

#include "../device/columns.h"
#include "../device/launch.h"
#include "../kernels.h"
#include "transform.h"

namespace randlora::cuda {
namespace {

// The first `gamma_blocks` blocks take gamma, `col_blocks` each of its rows; the others make the
// factors.
template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void hadamard_signed_diagonals_kernel(HadamardSignedDiagonals p, Factors<C> factors,
                                                 int gamma_blocks, int col_blocks) {
  constexpr int kWidth = kPerAccess<S>;
  const int block = blockIdx.x;
  if (block >= gamma_blocks) {
    const int c = (block - gamma_blocks) * blockDim.x + threadIdx.x;
    if (c < factors.groups * kValues<C>)
      *factors.at(c) = c < factors.K ? static_cast<const C*>(p.lam)[c] * p.col_signs[c] : C(0);
    return;
  }
  const int i = block / col_blocks;
  const int64_t d = p.sizes.d;
  const Columns<kWidth, Aligned> c((block - i * col_blocks) * blockDim.x * kWidth, threadIdx.x, d);
  const Pack<C, kWidth> gam = c.load(static_cast<const C*>(p.gam) + i * d);
  Pack<S, kWidth> out = {};
#pragma unroll
  for (int v = 0; v < kWidth; ++v)
    if (c.inside(v)) out.set(v, narrow<S>(gam.get(v) * p.a_signs[c.at(v)]));
  c.store(static_cast<S*>(p.signed_gam) + i * d, out);
}

constexpr int kEach = 4;  // elements of dgam of a thread

// The first `gamma_blocks` blocks make dgam, `row_blocks` each of its rows; the others dlam of
// expert blockIdx.y, for 32 columns each.
template <class S, class C = ComputeOf<S>>
__global__ void hadamard_diagonal_gradients_kernel(HadamardDiagonalGradients p, int gamma_blocks,
                                                   int row_blocks) {
  const int block = blockIdx.x, d = static_cast<int>(p.sizes.d), n = static_cast<int>(p.sizes.n);
  if (block < gamma_blocks) {
    const int i = block / row_blocks, k0 = (block - i * row_blocks) * kEach * blockDim.x;
    const S* from = static_cast<const S*>(p.class_gradient) + int64_t{i} * n;
    C* dgam = static_cast<C*>(p.dgam) + int64_t{i} * d;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      // Column k is at place k - m n of its class, so at ((m n + i) n + k - m n) of all.
      const int k = k0 + e * blockDim.x + threadIdx.x, m = k / n;
      if (k < d)
        dgam[k] =
            static_cast<C>(p.scale) * widen(from[int64_t{m} * n * (n - 1) + k]) * p.a_signs[k];
    }
    return;
  }
  const int K = static_cast<int>(p.sizes.K());
  const int c = (block - gamma_blocks) * 32 + threadIdx.x % 32;
  const C* sums = static_cast<const C*>(p.sums) + blockIdx.y * p.slots * K + c;
  const C sum =
      block_sum(c < K ? sums : nullptr, p.slots, K, reinterpret_cast<C*>(shared_memory()));
  if (threadIdx.x >= 32 || c >= K) return;
  static_cast<C*>(p.dlam)[int64_t{blockIdx.y} * K + c] =
      static_cast<C>(p.scale) * sum * p.col_signs[c];
}

void start_gradients(const HadamardDiagonalGradients& p, int gamma_blocks, int row_blocks,
                     int64_t experts, int threads, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = ClassOf<decltype(storage)>;
    launch(device, "hadamard_diagonal_gradients", hadamard_diagonal_gradients_kernel<S>,
           Grid(gamma_blocks + ceil_div(p.sizes.K(), 32), experts), threads,
           threads * int64_t{sizeof(ComputeOf<S>)}, p, gamma_blocks, row_blocks);
  });
}

}  // namespace

// One launch.
void hadamard_signed_diagonals(const HadamardSignedDiagonals& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = ClassOf<decltype(storage)>;
    constexpr int kWidth = kPerAccess<S>;
    const int threads = std::min(device.max_threads, 256);
    const int col_blocks = static_cast<int>(ceil_div(p.sizes.d, threads * kWidth));
    const int gamma_blocks = col_blocks * static_cast<int>(p.sizes.n);
    const Factors<ComputeOf<S>> factors(p.sizes, p.factors);
    launch(device, "hadamard_signed_diagonals",
           aligned_rows(p.sizes.d, kWidth, p.gam, p.signed_gam)
               ? hadamard_signed_diagonals_kernel<S, true>
               : hadamard_signed_diagonals_kernel<S, false>,
           gamma_blocks + ceil_div(p.sizes.room_of_factors(), threads), threads, 0, p, factors,
           gamma_blocks, col_blocks);
  });
}

// One launch.
void hadamard_diagonal_gradients(const HadamardDiagonalGradients& p, Device& device) {
  const int threads = std::min(device.max_threads, 256);
  const int row_blocks = static_cast<int>(ceil_div(p.sizes.d, threads * kEach));
  start_gradients(p, row_blocks * static_cast<int>(p.sizes.n), row_blocks, 1, threads, device);
}

// One launch.
void add_slots(const HadamardSlotSums& p, int64_t experts, Device& device) {
  HadamardDiagonalGradients of_lambda{};
  static_cast<HadamardSlotSums&>(of_lambda) = p;
  start_gradients(of_lambda, 0, 0, experts, std::min(device.max_threads, 256), device);
}

}  // namespace randlora::cuda
