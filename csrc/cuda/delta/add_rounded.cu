// out = base + delta, rounded once to 16 bits: W + dW for dense bases, whose dW comes from a GEMM.
//
// Floor: base and delta read and out written once, 8 bytes an element.
#include "../device/columns.h"
#include "../device/launch.h"
#include "../device/rounded_store.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

constexpr int kPerThread = 8;  // 16 bytes of out

template <class S, bool Aligned>
__global__ void add_rounded_kernel(RoundedStore<S> store, const float* __restrict__ delta,
                                   int64_t count) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPerThread;
  if (Aligned && first + kPerThread <= count) {
    float sum[kPerThread];
    load_run<kPerThread>(delta + first, sum);
    store.template run<kPerThread>(first, sum);
    return;
  }
  for (int64_t e = first; e < min(first + kPerThread, count); ++e) store.one(e, delta[e]);
}

template <class S>
void add_rounded_as(const AddRounded& p, Device& device) {
  const auto store = RoundedStore<S>::of(p, 1);
  const bool aligned = store.aligned(kPerThread) && reinterpret_cast<uintptr_t>(p.delta) % 16 == 0;
  const int threads = min(256, device.max_threads);
  launch(device, "add_rounded",
         aligned ? add_rounded_kernel<S, true> : add_rounded_kernel<S, false>,
         ceil_div(p.count, threads * kPerThread), threads, 0, store, p.delta, p.count);
}

}  // namespace

void add_rounded(const AddRounded& p, Device& device) {
  p.dtype == DType::bf16 ? add_rounded_as<bf16>(p, device) : add_rounded_as<f16>(p, device);
}

}  // namespace randlora::cuda
