// Conversions between storage types (f32, f64, bf16, f16) and the type they compute in.
#pragma once
#include <cstring>
#include <type_traits>

#include "../../core/dtype.h"
#include "cuda_or_cpu.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace randlora {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float widen(f16 x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
#endif
}

// narrow<S>(x) rounds to nearest, ties to even.
template <class S>
__device__ __forceinline__ S narrow(ComputeOf<S> x) {
  return x;  // float and double
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
#else
  const uint32_t bits = bits_of_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
#if defined(__CUDACC__)
  return f16{__half_as_ushort(__float2half_rn(x))};
#else
  const _Float16 h = static_cast<_Float16>(x);
  f16 r;
  memcpy(&r.bits, &h, 2);
  return r;
#endif
}

}  // namespace randlora
