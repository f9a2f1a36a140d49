// This library has its own CUDA runtime, linked statically. The driver has one current card for it
// and for torch's runtime, so make_current changes nothing if torch has made the card current.
// make_current does not restore the previous card: setting a card without a context creates one,
// which takes half a gigabyte. torch's guard restores it, since torch knows which cards have a
// context.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace randlora {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next launch would report it
  throw std::runtime_error(std::string("randlora: CUDA error in ") + what + ": " +
                           cudaGetErrorString(error));
}

namespace cuda {
namespace {

int attribute(cudaDeviceAttr attr, int index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attr, index), "describe");
  return value;
}

}  // namespace

void describe(int index, Device& device) {
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
}

void make_current(int index) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "make_current");
  if (current != index) check_cuda(cudaSetDevice(index), "make_current");
}

const char* refusal(int index) {
  make_current(index);
  cudaFuncAttributes facts;
  const cudaError_t error = cudaFuncGetAttributes(&facts, some_kernel());
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    // The card would need PTX, which this driver does not compile.
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      cudaGetLastError();  // clears it
      return cudaGetErrorString(error);
    default: check_cuda(error, "refusal"); return nullptr;
  }
}

}  // namespace cuda
}  // namespace randlora
