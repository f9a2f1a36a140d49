// nvcc compiles the kernels for the card. g++ compiles the same sources for tests, with a header
// instead of the CUDA language (tests/cuda_on_cpu, docs/cuda-on-cpu.md).
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

namespace randlora {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes

}  // namespace randlora
