// What the CUDA library needs from its host: a stream, scratch memory, and facts about the GPU. The
// torch binding implements it with torch's allocator; the tests that run the kernels on the CPU use
// malloc, so this file includes no CUDA header.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace randlora {

class Device {
 public:
  virtual ~Device() = default;
  // Stream-ordered device memory: 256-byte aligned, not initialised, valid until the operator
  // returns.
  virtual void* scratch(size_t bytes) = 0;

  void* stream = nullptr;  // a cudaStream_t
  int multiprocessors = 1;
  int64_t shared_bytes = 48 << 10;  // the most dynamic shared memory a block may have
  int max_threads = 256;            // per block; a multiple of 32, at most 256
  int64_t chunk_bytes = 64 << 20;   // limit for a (T, K) intermediate; larger T is chunked
};

// An array of scratch memory.
template <class Element>
Element* scratch(Device& device, int64_t count) {
  return static_cast<Element*>(device.scratch(static_cast<size_t>(count) * sizeof(Element)));
}

}  // namespace randlora
