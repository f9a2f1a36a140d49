// One macro for functions that host kernels and CUDA kernels share.
#pragma once

// Such functions have internal linkage and are always inlined. The CPU sources are compiled several
// times with different -m flags. An ordinary `inline` function is a weak symbol, and the linker
// keeps one copy for the whole library. If it kept the AVX-512 copy, the "portable" kernels would
// crash with an illegal instruction on a machine without AVX-512.
#if defined(__CUDACC__)
#define RANDLORA_HD static __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define RANDLORA_HD static __forceinline
#else
#define RANDLORA_HD static inline __attribute__((always_inline))
#endif

// The same for member functions, which cannot be `static`.
#if defined(__CUDACC__)
#define RANDLORA_HD_MEMBER __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define RANDLORA_HD_MEMBER __forceinline
#else
#define RANDLORA_HD_MEMBER inline __attribute__((always_inline))
#endif

// And for members that only the host calls.
#if defined(_MSC_VER) && !defined(__clang__)
#define RANDLORA_HOST_MEMBER __forceinline
#else
#define RANDLORA_HOST_MEMBER inline __attribute__((always_inline))
#endif
