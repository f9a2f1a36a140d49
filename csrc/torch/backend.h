// Where an operator runs: the CPU kernels of this process, or the CUDA library once it is loaded.
// An op validates, allocates, and calls run(); it does not care which of the two follows.
#pragma once
#include <optional>
#include <string>

#include "../core/cuda_table.h"
#include "../cpu/dispatch.h"
#include "common.h"

namespace randlora {

// Loads librandlora_cuda.so. With `serve_cpu_tensors` the same table also serves CPU tensors: for a
// library whose kernels were compiled for the CPU (tests, docs/cuda-on-cpu.md). Throws with the reason
// where the file cannot be loaded or does not fit this build.
void load_cuda(const std::string& path, bool serve_cpu_tensors);
bool cuda_loaded();
std::string cuda_build();  // "" where nothing is loaded

// The table; throws where it is not loaded.
const CudaKernels& cuda_kernels();
bool runs_on_cuda(const Tensor& t);

// The device of a tensor, entered for as long as this lives: its current stream, torch's allocator
// and torch's matrix product.
class TorchDevice : public Device {
 public:
  explicit TorchDevice(const Tensor& like);
  void* scratch(size_t bytes) override;
  void gemm(const Gemm& g) override;
  int64_t read(const int64_t* value) override;

 private:
  const Tensor& like_;
  std::optional<torch::stable::accelerator::DeviceGuard> card_;
  std::vector<Tensor> held_;
};

template <class P>
void run(const Tensor& on, void (*Kernels::*cpu)(const P&, Runtime&),
         void (*CudaKernels::*cuda)(const P&, Device&), const P& p) {
  if (runs_on_cuda(on)) {
    TorchDevice device(on);
    (cuda_kernels().*cuda)(p, device);
  } else {
    TorchRuntime runtime;
    (cpu_kernels().*cpu)(p, runtime);
  }
}

}  // namespace randlora
