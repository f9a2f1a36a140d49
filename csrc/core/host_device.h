// Macros for functions that host kernels and CUDA kernels share.
#pragma once

// Such functions have internal linkage and are always inlined. The CPU sources are compiled several
// times with different -m flags. An ordinary `inline` function is a weak symbol, and the linker
// keeps one copy for the whole library. If it kept the AVX-512 copy, the "portable" kernels would
// crash with an illegal instruction on a machine without AVX-512.
#define RANDLORA_HD static RANDLORA_HD_MEMBER

// The same for members, which cannot be `static`: those that only the host calls, and those that
// both call. A function that only the host calls is `static RANDLORA_HOST_MEMBER`.
#define RANDLORA_HOST_MEMBER inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define RANDLORA_HD_MEMBER __host__ __device__ __forceinline__
#else
#define RANDLORA_HD_MEMBER RANDLORA_HOST_MEMBER
#endif
