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
#define RANDLORA_FUNCTION(name, Operator) cuda::name,
  static constexpr CudaKernels table = {kCudaInterface,      RANDLORA_COMPILER,
                                        cuda::describe,      cuda::make_current,
                                        cuda::refusal,       cuda::support_tables,
                                        cuda::hadamard_fits, RANDLORA_OPERATORS(RANDLORA_FUNCTION)};
#undef RANDLORA_FUNCTION
  return &table;
}
