// The last step of operators that add to a matrix: a sum in the compute type becomes an element,
// out[e] = round(base[e] + scale * sum).
#pragma once
#include "columns.h"

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
  // The same for the elements of 16 bytes from e on, where out + e and base + e are aligned.
  __device__ __forceinline__ void run(int64_t e, const C (&sum)[kPerAccess<S>]) const {
    using Run = Pack<S, kPerAccess<S>>;
    Run x = base ? *reinterpret_cast<const Run*>(base + e) : Run{};
#pragma unroll
    for (int v = 0; v < kPerAccess<S>; ++v) x.set(v, rounded(sum[v], x.get(v)));
    x.store(out + e);
  }
};

}  // namespace randlora
