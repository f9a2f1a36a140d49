// The last step of operators that add to a matrix: a sum in the compute type becomes an element,
// out[e] = round(base[e] + scale * sum).
#pragma once
#include "columns.h"
#include "launch.h"

namespace randlora {

template <class S_>
struct RoundedStore {
  using S = S_;
  using C = ComputeOf<S>;
  S* out;
  const S* base;  // null for none; may be `out` itself
  C scale;

  __device__ __forceinline__ S rounded(C sum, S old) const {
    return narrow<S>(widen(old) + scale * sum);
  }
  __device__ __forceinline__ void one(int64_t e, C sum) const {
    out[e] = rounded(sum, base ? base[e] : S{});
  }
};

// One thread for each of `count` elements adds up its parts, in order.
template <class S>
__global__ void sum_parts_kernel(const ComputeOf<S>* part, int64_t parts, int64_t count,
                                 RoundedStore<S> store) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= count) return;
  ComputeOf<S> sum = part[e];
#pragma unroll 4
  for (int64_t s = 1; s < parts; ++s) sum += part[s * count + e];
  store.one(e, sum);
}
template <class S>
void sum_parts(const ComputeOf<S>* part, int64_t parts, int64_t count, const RoundedStore<S>& store,
               Device& device) {
  launch(device, "sum_parts", sum_parts_kernel<S>, ceil_div(count, 128), 128, 0, part, parts, count,
         store);
}

}  // namespace randlora
