// nvcc compiles the kernels for the card. g++ compiles the same sources for tests, with a header
// instead of the CUDA language (tests/cuda_on_cpu). And what kernels everywhere use of a warp.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

namespace randlora {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// Sums v[0 .. Count) over the lanes of a segment (of `Lanes` adjacent ones) that differ by a
// multiple of Apart; all are powers of two, Count * Apart <= Lanes. Lane l of a segment gets sum
// number l / (Lanes / Count). A lane gives away half of its values in each round while it has
// several: Count - 1 + log2(Lanes / Count) shuffles instead of Count log2(Lanes). The order is
// fixed.
template <int Count, int Apart = 1, int Lanes = 32, class C>
__device__ __forceinline__ C warp_sums(C (&v)[Count]) {
  static_assert(Count * Apart <= Lanes, "a lane for every sum");
  const int lane = threadIdx.x % 32;
  int bit = Lanes / 2;
#pragma unroll
  for (int half = Count / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const C give = upper ? v[i] : v[half + i], keep = upper ? v[half + i] : v[i];
      v[i] = keep + __shfl_xor_sync(kWarp, give, bit);
    }
  }
#pragma unroll
  for (; bit >= Apart; bit /= 2) v[0] += __shfl_xor_sync(kWarp, v[0], bit);
  return v[0];
}

}  // namespace randlora
