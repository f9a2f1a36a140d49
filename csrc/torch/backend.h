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
// that compile the CUDA kernels for the CPU (docs/cuda-on-cpu.md). Throws, and changes nothing, if
// the file cannot be loaded, does not match this build, or is too new for the machine's driver.
void load_cuda(const std::string& path, bool serve_cpu_tensors);
std::string cuda_build();  // "" if nothing is loaded

// Registers operators of torch.ops.randlora: schemas, and functions for CPU tensors; for CUDA
// tensors, too, once our library is loaded. Until then torch's dispatcher takes plain torch
// (randlora_ext/ops), where an operator has that.
struct Operator {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);  // RANDLORA_BOX(function)
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

// `count` matrices (rows, cols) in the memory of one tensor, from its element `first` on; next, row
// and col are strides in elements.
struct MatrixBatch {
  const Tensor* in;  // of `dtype`, or on the CPU of any
  DType dtype;
  int64_t first, count, rows, cols, next, row, col;

  MatrixBatch transposed() const { return {in, dtype, first, count, cols, rows, next, col, row}; }
  MatrixBatch matrices(int64_t begin, int64_t number) const {
    return {in, dtype, first + begin * next, number, rows, cols, next, row, col};
  }
  MatrixBatch part_of_rows(int64_t begin, int64_t end) const {
    return {in, dtype, first + begin * row, count, end - begin, cols, next, row, col};
  }
  MatrixBatch part_of_cols(int64_t begin, int64_t end) const {
    return {in, dtype, first + begin * col, count, rows, end - begin, next, row, col};
  }
  // The matrices as a tensor; as a matrix, if there is one.
  Tensor tensor() const;
};

// out = beta * out + alpha * left @ right by torch's GEMM, in one dtype on one device. With
// beta = 0, out is not read. On the CPU the result does not depend on the number of threads.
void multiply(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double alpha, double beta);
void multiply_whole(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double alpha, double beta);
// How many GEMMs `multiply` has started on cards, which tests/gpu counts.
int64_t products();

// Runs operator `p` by the kernels for the device of `on`.
#define RANDLORA_DECLARE(name, Operator) void run(const Tensor& on, const Operator& p);
RANDLORA_OPERATORS(RANDLORA_DECLARE)
#undef RANDLORA_DECLARE

}  // namespace randlora
