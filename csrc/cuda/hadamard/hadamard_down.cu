// u[t, c] = sum over o of row_signs[o] H[o, c] y[t, o], with c = j * n + i, and from it
//
//   w[m, t, i] = sum over j of H[j, m] factors[c] u[t, c]
//   sums[q, c] = sum over the tokens t of slot q of u[t, c] * sum over m of H[j, m] z[m, t, i]
//
// hadamard_up backwards. Rows o and o + N of H are equal, so the elements of y with equal o modulo
// N are added first, and the transform has N numbers however large D is.
//
// Without sums a thread block takes one token, or several if rows are short. With sums it takes a
// slot and walks its tokens; it mixes z into a second part of shared memory and keeps the sums in a
// third, where always the same thread adds to an element: nobody else touches it, and the order is
// that of the tokens.
//
// Floor: y (and z) read and w written once.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned, class C = ComputeOf<S>>
__device__ __forceinline__ void read_y(const HadamardDown& p, const Rows<C>& rows, int log, int t0,
                                       int tokens) {
  using At = Edge<S, Aligned>;
  constexpr int kWidth = At::kWidth;
  const int D = static_cast<int>(p.sizes.D), N = 1 << log;
  for (int g = threadIdx.x; g < tokens << log >> kBits<C>; g += blockDim.x) {
    const At at(g, log);
    const S* y = static_cast<const S*>(p.y) + int64_t{t0 + at.row} * D;
    const float* signs = p.row_signs;
    C v[kValues<C>];
#pragma unroll
    for (int e = 0; e < kValues<C>; ++e) v[e] = C(0);
#pragma unroll 1
    for (int left = D; left > 0; left -= N, y += N, signs += N) {
      const int end = min(left, N);
#pragma unroll
      for (int e = 0; e < At::kCount; ++e) {
        const auto c = at.columns(e, end);
        if (!c.inside(0)) continue;
        const auto sign = c.load(signs);
        const auto from = c.load(y);
#pragma unroll
        for (int u = 0; u < kWidth; ++u) v[e * kWidth + u] += widen(from.get(u)) * sign.get(u);
      }
    }
    hadamard<kWidth>(v);
    at.store(v, rows);
  }
}

// sum[e] += a[e] b[e], for kValues numbers.
template <class C>
__device__ __forceinline__ void add_products(const C (&a)[kValues<C>], const C* b, C* sum) {
  constexpr int kWidth = kPerAccess<C>;
#pragma unroll
  for (int e = 0; e < kValues<C>; e += kWidth) {
    C factors[kWidth], sums[kWidth];
    load_run<kWidth>(b + e, factors);
    load_run<kWidth>(sum + e, sums);
#pragma unroll
    for (int u = 0; u < kWidth; ++u) sums[u] += a[e + u] * factors[u];
    store_run<kWidth>(sums, sum + e);
  }
}

constexpr int kParts = 3;  // of shared memory, with z

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, 2)
    hadamard_down_kernel(HadamardDown p, Factors<C> factors, int log, int of_block) {
  using Z = ClassOf<S>;
  const int K = static_cast<int>(p.sizes.K());
  const int size = static_cast<int>(Rows<C>::bytes(of_block << log) / sizeof(C));
  const Rows<C> rows{reinterpret_cast<C*>(shared_memory())}, mixed{rows.numbers + size},
      sums{mixed.numbers + size};
  const int64_t q = blockIdx.x;  // the host's chunks have less than 2^31 tokens
  const int begin = static_cast<int>(p.z ? q * p.T / p.slots : q * of_block);
  const int end =
      static_cast<int>(p.z ? (q + 1) * p.T / p.slots : min(q * of_block + of_block, p.T));
  if (p.z) {
    for (int e = threadIdx.x; e < size; e += blockDim.x) sums.numbers[e] = C(0);
    __syncthreads();  // for a slot without tokens
  }
  for (int t0 = begin; t0 < end; t0 += of_block) {
    const int tokens = min(of_block, end - t0);
    read_y<S, Aligned>(p, rows, log, t0, tokens);
    if (p.z) mix<Aligned>(p.sizes, static_cast<const Z*>(p.z), p.T, mixed, log, t0, tokens);
    __syncthreads();
    middle_passes(rows, log, kEdgeBits<S>, tokens << log);
    low_pass(rows, log, tokens, K, [&](auto& v, int x, int c) {
      hadamard<1>(v);
      if (p.z) add_products(v, mixed.at(x), sums.at(x));
      factors.apply(v, c);
    });
    __syncthreads();
    mix<Aligned>(p.sizes, static_cast<Z*>(p.w), p.T, rows, log, t0, tokens);
    __syncthreads();
  }
  if (!p.z) return;
  C* out = static_cast<C*>(p.sums) + q * K;
  for (int c = threadIdx.x; c < K; c += blockDim.x) {
    C sum = *sums.at(c);
    for (int t = 1; t < of_block; ++t) sum += *sums.at((t << log) + c);
    out[c] = sum;
  }
}

}  // namespace

bool hadamard_fits(const HadamardSizes& sizes, DType dtype, const Device& device) {
  bool fits = false;
  with_dtype(dtype, [&](auto storage) {
    fits = Plan<decltype(storage)>(sizes, 1, device, kParts).shared <= device.shared_bytes;
  });
  return fits;
}

// One launch.
void hadamard_down(const HadamardDown& p, Device& device) {
  with_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t blocks = p.z ? p.slots : device.multiprocessors;
    const Plan<S> plan(p.sizes, p.T / blocks, device, p.z ? kParts : 1);
    launch(device, "hadamard_down",
           aligned_rows(p.sizes.D, kPerAccess<S>, p.y, p.row_signs, p.z, p.w)
               ? hadamard_down_kernel<S, true>
               : hadamard_down_kernel<S, false>,
           p.z ? p.slots : ceil_div(p.T, plan.rows), plan.threads, plan.shared, p,
           Factors<ComputeOf<S>>(p.sizes, p.factors), plan.log, plan.rows);
  });
}

}  // namespace randlora::cuda
