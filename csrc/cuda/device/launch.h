// Starting a kernel: one place that raises the shared-memory limit, launches and checks.
//
//   launch(device, "fill_planes", fill_planes_kernel, grid, threads, shared_bytes, arguments...)
//
// All shared memory is dynamic: a kernel gets it from shared_memory() and divides it itself.
#pragma once
#include "../../core/device.h"
#include "cuda_or_cpu.h"

namespace randlora {

// Shared memory of a block: the default on any card, and the smallest opt-in maximum of supported
// cards (sm_86, 89 and 120).
constexpr int64_t kFreeShared = 48 << 10, kLeastShared = 99 << 10;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks.
struct Grid : dim3 {
  Grid(int64_t x, int64_t y = 1) : dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)) {}
};

#if defined(__CUDACC__)
void check_cuda(cudaError_t error, const char* what);  // context.cpp
#endif

template <class... P, class... A>
void launch(const Device& device, const char* name, void (*kernel)(P...), Grid grid, int threads,
            int64_t shared_bytes, A... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
#if defined(__CUDACC__)
  // The limit is what the card has, not what this launch needs: another thread that starts the same
  // kernel with less could lower it before this launch.
  if (shared_bytes > kFreeShared)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(device.shared_bytes)),
               name);
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(device.stream)>>>(static_cast<P>(arguments)...);
  check_cuda(cudaGetLastError(), name);
#else
  cuda_on_cpu::note_start(reinterpret_cast<const void*>(kernel));
  cuda_on_cpu::note_launch(name, grid.x);
  const int64_t limit = device.shared_bytes > kFreeShared ? device.shared_bytes : kFreeShared;
  cuda_on_cpu::run(name, grid, threads, shared_bytes, limit,
                   [&] { kernel(static_cast<P>(arguments)...); });
#endif
}

__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char randlora_shared[];
  return randlora_shared;
#else
  return cuda_on_cpu::shared();
#endif
}

}  // namespace randlora
