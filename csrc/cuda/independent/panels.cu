// Token panels (panels.h): a blocked transposition. One block transposes `width` tokens x 64
// features in shared memory; reads and writes are packs of 16 bytes, 128 bytes of a row side by
// side.
//
// Floor: z read once, the panels written once. Parts of the tokens reuse the same panels, which
// then stay in L2.
#include "../device/columns.h"
#include "../device/launch.h"
#include "panels.h"

namespace randlora::cuda {
namespace {

constexpr int kFeatures = 64;  // of a block's tile

// An odd number of 32-bit words (or doubles) per row, so that a column's elements lie in different
// banks.
template <class S>
constexpr int kStride = kFeatures + (sizeof(S) == 2 ? 2 : 1);

template <class S>
__global__ void fill(const S* __restrict__ z, int64_t T, int64_t features, int width, bool aligned,
                     S* __restrict__ data) {
  constexpr int kWidth = kPerAccess<S>;
  S* tile = reinterpret_cast<S*>(shared_memory());  // (width, kStride)
  const int64_t tiles = ceil_div(features, kFeatures);
  const int64_t panel = blockIdx.x / tiles, f0 = blockIdx.x % tiles * kFeatures;
  const int64_t t0 = panel * width;

  if (aligned) {  // features is a multiple of kWidth
    for (int x = threadIdx.x; x < width * (kFeatures / kWidth); x += blockDim.x) {
      const int t = x / (kFeatures / kWidth), f = x % (kFeatures / kWidth) * kWidth;
      Pack<S, kWidth> pack = {};
      if (t0 + t < T && f0 + f < features)
        pack = *reinterpret_cast<const Pack<S, kWidth>*>(z + (t0 + t) * features + f0 + f);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) tile[t * kStride<S> + f + e] = pack.get(e);
    }
  } else {
    for (int x = threadIdx.x; x < width * kFeatures; x += blockDim.x) {
      const int t = x / kFeatures, f = x % kFeatures;
      S value = {};
      if (t0 + t < T && f0 + f < features) value = z[(t0 + t) * features + f0 + f];
      tile[t * kStride<S> + f] = value;
    }
  }
  __syncthreads();
  const int in_row = width / kWidth;
  for (int x = threadIdx.x; x < kFeatures * in_row; x += blockDim.x) {
    const int f = x / in_row, t = x % in_row * kWidth;
    if (f0 + f >= features) continue;
    Pack<S, kWidth> pack = {};
#pragma unroll
    for (int e = 0; e < kWidth; ++e) pack.set(e, tile[(t + e) * kStride<S> + f]);
    pack.store(data + ((panel * features + f0 + f) * width + t));
  }
}

}  // namespace

void fill_panels(const void* z, int64_t T, const Panels& panels, DType dtype, Device& device) {
  with_dtype(dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t blocks =
        ceil_div(T, panels.width) * ceil_div(panels.features, int64_t{kFeatures});
    launch(device, "fill_panels", fill<S>, blocks, min(256, device.max_threads),
           panels.width * kStride<S> * int64_t{sizeof(S)}, z, T, panels.features, panels.width,
           aligned_rows(panels.features, kPerAccess<S>, z), panels.data);
  });
}

}  // namespace randlora::cuda
