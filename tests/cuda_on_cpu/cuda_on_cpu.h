// The part of the CUDA language that csrc/cuda uses, for g++. The same .cu files then run on the
// CPU, one fiber per CUDA thread, under sanitizers and checks (CONTRIBUTING.md). This file has
// the language and ptx_on_cpu.h the instructions; engine.cpp runs grids, fiber.h switches threads,
// and schedule.h orders them.
#pragma once
#include <string.h>

#include <cstdint>
#include <type_traits>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = struct CUstream_st*;

// ---- arithmetic ---------------------------------------------------------------------------------

template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T min(A a, B b) {
  static_assert(std::is_integral_v<T>, "NaN needs fmin");
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T max(A a, B b) {
  static_assert(std::is_integral_v<T>, "NaN needs fmax");
  return T(a) < T(b) ? T(b) : T(a);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// ---- barriers and warp collectives --------------------------------------------------------------

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::barrier({"__syncthreads", file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::collective({"__syncwarp", file, line}, mask, nullptr, nullptr, true);
}

namespace cuda_on_cpu {

template <class T>
T shuffle_of(Site site, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no such shuffle");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(site, mask, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T v, int source, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_of({"__shfl_sync", file, line}, mask, v, source & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_of({"__shfl_up_sync", file, line}, mask, v, cuda_on_cpu::lane() - by);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int by, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle_of({"__shfl_xor_sync", file, line}, mask, v,
                                 cuda_on_cpu::lane() ^ by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
