// Chooses between the CPU kernels and the CUDA library. An operator validates, allocates, and calls
// run(), which dispatches by device.
#pragma once
#include <optional>
#include <string>

#include "../core/cuda_table.h"
#include "../cpu/dispatch.h"
#include "common.h"

namespace randlora {

// Loads librandlora_cuda.so. With `serve_cpu_tensors` its kernels also serve CPU tensors: for tests
// that compile the CUDA kernels for the CPU (CONTRIBUTING.md). Throws, and changes nothing, if
// the file cannot be loaded, does not match this build, or is too new for the machine's driver.
void load_cuda(const std::string& path, bool serve_cpu_tensors);
std::string cuda_build();  // "" if nothing is loaded

// Registers operators of torch.ops.randlora: schemas, and functions for CPU tensors; for CUDA
// tensors, too, once our library is loaded. Until then torch's dispatcher takes plain torch
// (randlora_ext/ops), where an operator has that.
struct Operator {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);  // RANDLORA_BOX(function), or by Arguments
};
struct Operators {
  Operators(std::initializer_list<Operator> all);
};

// Throws if the library is not loaded.
const CudaKernels& cuda_kernels();
bool runs_on_cuda(const Tensor& t);

// None for the CPU, whose tensors tests give to the CUDA library.
using Card = std::optional<int>;
Card card_of(const Tensor& t);

// "", or why the library cannot run on this card: it was built for others. Asks the card once.
std::string cuda_refusal(Card card);
// Whether our kernels run on the device of `t`. Elsewhere an operator calls plain torch if it has
// that (randlora_ext/ops); `run` throws.
bool has_kernels(const Tensor& t);

// Whether the rows of H fit into the shared memory of a card.
bool hadamard_fits(const HadamardSizes& sizes, DType dtype, Card card);

// Makes a tensor's device current while this object lives, and gives kernels its current stream and
// torch's allocator.
class TorchDevice : public Device {
 public:
  explicit TorchDevice(const Tensor& like);
  void* scratch(size_t bytes) override;

 private:
  const Tensor& like_;
  std::optional<torch::stable::accelerator::DeviceGuard> card_;
  std::vector<Tensor> held_;
};

// Runs operator `p` by the kernel for the device of `on`: HadamardDown by hadamard_down, and so on
// (csrc/cpu, csrc/cuda).
#define RANDLORA_DECLARE(name, Operator) void run(const Tensor& on, const Operator& p);
RANDLORA_OPERATORS(RANDLORA_DECLARE)
#undef RANDLORA_DECLARE

}  // namespace randlora
