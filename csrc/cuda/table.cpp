// The library's one exported symbol (exports.map).
#include "../core/cuda_table.h"
#include "context.h"
#include "kernels.h"

#if !defined(RANDLORA_VERSION) || !defined(RANDLORA_CUDA_BUILD)
#error "the build defines RANDLORA_VERSION and RANDLORA_CUDA_BUILD (csrc/cuda/nvcc.py)"
#endif

extern "C" __attribute__((visibility("default"))) const randlora::CudaKernels*
randlora_cuda_kernels() {
  using namespace randlora;
  static constexpr CudaKernels table = {kCudaInterface,
                                        RANDLORA_VERSION,
                                        RANDLORA_CUDA_BUILD,
                                        cuda::describe,
                                        cuda::make_current,
                                        cuda::fill_planes,
                                        cuda::fill_balanced,
                                        cuda::balanced_to_planes,
                                        cuda::count_lists,
                                        cuda::fill_lists,
                                        cuda::planes_to_dense,
                                        cuda::lists_to_dense,
                                        cuda::pack_dense,
                                        cuda::scaled_basis,
                                        cuda::scaled_basis_backward,
                                        cuda::delta_weight,
                                        cuda::delta_weight_backward,
                                        cuda::linear,
                                        cuda::linear_backward};
  return &table;
}
