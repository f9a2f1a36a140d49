// Rows of N numbers too long for shared memory: they lie in scratch memory, in chunks of tokens,
// and every pass of the transform is a kernel of its own (hadamard_scratch.cu).
#pragma once
#include "transform.h"

namespace randlora::cuda {

template <class C>
struct InScratch {
  int log, threads;
  int64_t chunk;  // of rows
  C* numbers;
  Device& device;

  InScratch(int log_, int64_t count, Device& device_)
      : log(log_),
        threads(std::min(device_.max_threads, kScratchThreads)),
        chunk(std::clamp<int64_t>((device_.chunk_bytes / int64_t{sizeof(C)}) >> log, 1,
                                  std::max<int64_t>(count, 1))),
        numbers(scratch<C>(device_, chunk << log)),
        device(device_) {}

  // For kernels whose threads take several items if there are very many.
  int64_t blocks(int64_t items) const {
    return std::min(ceil_div(items, threads), int64_t{1} << 20);
  }
  int64_t of_numbers(int64_t rows) const { return blocks(rows << log >> kBits<C>); }
  template <class Kernel, class... A>
  void start(const char* name, Kernel kernel, Grid grid, A... arguments) {
    launch(device, name, kernel, grid, threads, 0, arguments...);
  }

  // One launch each; `transform` one for each middle pass. C is the compute type of z's `dtype`.
  void mix(const HadamardSizes& sizes, const void* z, DType dtype, int64_t T, C* mixed, int64_t t0,
           int64_t tokens);
  // The low pass. If `up`, lam and col multiply v before it; otherwise after it, once v has been
  // multiplied into mixed (unless null).
  void low(bool up, const Diagonal<C>& diagonal, C* mixed, int64_t tokens);
  void transform(int edge, int64_t tokens);
};

}  // namespace randlora::cuda
