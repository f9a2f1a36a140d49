// What a launcher of the CUDA library may ask of its host: a stream, scratch memory, a matrix
// product, and facts about the card. No CUDA header here: the torch binding implements it with
// torch's allocator and cuBLAS, the tests that run the kernels on the CPU with malloc and loops.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace randlora {

// out (M, N) = scale * left right^T [+ out], all row-major in `dtype`; or left right when
// `right_rows_are_k` (right is (K, N) then). fp32 sums, one rounding.
struct Gemm {
  int64_t M, N, K;
  const void *left, *right;
  void* out;
  DType dtype;
  double scale;
  bool right_rows_are_k, accumulate;
};

class Device {
 public:
  virtual ~Device() = default;
  // Device memory on the stream's own order: 256-byte aligned, not initialised, valid until the
  // operator returns.
  virtual void* scratch(size_t bytes) = 0;
  virtual void gemm(const Gemm& g) = 0;
  // A value in device memory once everything on the stream is done: the one place that waits.
  virtual int64_t read(const int64_t* device_value) = 0;

  void* stream = nullptr;  // a cudaStream_t
  int multiprocessors = 1;
  int64_t shared_bytes = 48 << 10;  // the most dynamic shared memory a block may have
  int max_threads = 256;            // of a block; a multiple of 32
  bool tf32 = false;                // fp32 products may run as tf32 on tensor cores
  int64_t chunk_bytes = 64 << 20;   // of a (T, K) intermediate: more tokens go in chunks
};

// An array of scratch memory.
template <class T>
T* scratch(Device& device, int64_t count) {
  return static_cast<T*>(device.scratch(static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace randlora
