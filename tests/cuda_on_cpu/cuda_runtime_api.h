// Replaces CUDA's header of this name when csrc/cuda/device/context.cpp is compiled for the CPU. It
// offers small GPUs that remember whether a context was made on them.
#pragma once
#include <atomic>
#include <cstdlib>

namespace cuda_on_cpu {

inline std::atomic<bool> has_context[2];   // of each card
inline thread_local int current_card = 0;  // a new thread's, without a context

}  // namespace cuda_on_cpu

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidDevice,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorInvalidPtx,
  cudaErrorJitCompilerNotFound,
  cudaErrorJitCompilationDisabled,
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                         : "no kernel image is available for the device";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* index) {
  *index = cuda_on_cpu::current_card;
  return cudaSuccess;
}
// Makes a context, as CUDA does from 12.0 on.
inline cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index > 1) return cudaErrorInvalidDevice;
  cuda_on_cpu::current_card = index;
  cuda_on_cpu::has_context[index] = true;
  return cudaSuccess;
}
// Three multiprocessors: work is split between blocks even if there is little of it.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index < 0 || index > 1) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 << 10;
  return cudaSuccess;
}
// CUDA_ON_CPU_NO_CODE=1 makes card 1 one that the library was not built for.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const char* without = std::getenv("CUDA_ON_CPU_NO_CODE");
  const bool here = without && std::atoi(without) == cuda_on_cpu::current_card;
  return here ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
