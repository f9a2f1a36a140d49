// The library's one exported symbol (exports.map).
#include "../core/cuda_table.h"
#include "kernels.h"

#if defined(__CUDACC__)
#define RANDLORA_NVCC RANDLORA_TEXT(__CUDACC_VER_MAJOR__) "." RANDLORA_TEXT(__CUDACC_VER_MINOR__)
#define RANDLORA_COMPILER "nvcc " RANDLORA_NVCC ": " RANDLORA_TEXT(__CUDA_ARCH_LIST__)
#else
#define RANDLORA_COMPILER "C++ " __VERSION__ ", on the CPU"
#endif

extern "C" __attribute__((visibility("default"))) const randlora::CudaKernels*
randlora_cuda_kernels() {
  using namespace randlora;
  static constexpr CudaKernels table = [] {
    CudaKernels all{};
    all.interface = kCudaInterface;
    all.build = RANDLORA_COMPILER;
    all.describe = cuda::describe;
    all.make_current = cuda::make_current;
    all.refusal = cuda::refusal;
    all.support_tables = cuda::support_tables;
    all.hadamard_fits = cuda::hadamard_fits;
#define RANDLORA_SET(name, Operator) all.name = cuda::name;
    RANDLORA_OPERATORS(RANDLORA_SET)
#undef RANDLORA_SET
    return all;
  }();
  return &table;
}
