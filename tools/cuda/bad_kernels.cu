// Kernels that the compile gate must refuse (compile_gate.py, control). Never built otherwise.
#include "device/launch.h"

namespace randlora {
namespace cuda {

// More live values than registers, which need a stack.
__global__ void __launch_bounds__(1024) spills(float* x) {
  float a[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i)
    x[i * 1024 + threadIdx.x] = a[127 - i] + a[(i * 37 + 11) % 128] * a[(i * 53 + 5) % 128];
}

__global__ void locks(float* x) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  atomicAdd(sums + threadIdx.x / 2, x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = sums[threadIdx.x];
}

}  // namespace cuda
}  // namespace randlora
