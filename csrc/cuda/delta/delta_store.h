// The last step of delta_weight from lists, hadamard_weight and add_rounded: a sum in the compute
// type becomes an element of dW, out[e] = round(base[e] + scale * sum), to nearest or
// stochastically. (From planes: Output in ternary_io.h.)
#pragma once
#include "../../core/operators.h"
#include "../../core/stochastic.h"
#include "../device/element.h"

namespace randlora {
namespace cuda {

// One access of 4, 8 or 16 bytes.
template <int Words>
__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[Words]) {
  if constexpr (Words == 1) w[0] = *static_cast<const uint32_t*>(p);
  if constexpr (Words == 2) {
    const uint2 u = *static_cast<const uint2*>(p);
    w[0] = u.x, w[1] = u.y;
  }
  if constexpr (Words == 4) {
    const uint4 u = *static_cast<const uint4*>(p);
    w[0] = u.x, w[1] = u.y, w[2] = u.z, w[3] = u.w;
  }
}
template <int Words>
__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[Words]) {
  if constexpr (Words == 1) *static_cast<uint32_t*>(p) = w[0];
  if constexpr (Words == 2) *static_cast<uint64_t*>(p) = uint64_t{w[1]} << 32 | w[0];
  if constexpr (Words == 4) *static_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
}

template <class S>
struct DeltaStore {
  using C = typename ComputeOf<S>::type;
  S* out;
  const S* base;  // null for none; may be `out` itself
  C scale;
  bool stochastic;
  uint64_t seed;

  // P is DeltaWeight or HadamardWeight.
  template <class P>
  explicit DeltaStore(const P& p)
      : out(static_cast<S*>(p.out)),
        base(static_cast<const S*>(p.base)),
        scale(static_cast<C>(p.scale)),
        stochastic(p.stochastic && sizeof(S) == 2),
        seed(p.rounding_seed) {}

  // Whether runs of N are aligned at every e that N divides.
  bool aligned(int N) const {
    const auto misfit = [&](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % (N * sizeof(S));
    };
    return misfit(out) == 0 && misfit(base) == 0;
  }

  __device__ __forceinline__ void one(int64_t e, C sum) const { one(e, sum, base ? base[e] : S{}); }
  // The same with the element of the base that the caller has loaded, or zero.
  __device__ __forceinline__ void one(int64_t e, C sum, S old) const {
    const C x = widen(old) + scale * sum;
    if constexpr (sizeof(S) == 2)
      if (stochastic) {
        out[e] = round_stochastic(x, rounding_word(seed, static_cast<uint64_t>(e)), S{});
        return;
      }
    out[e] = narrow<S>(x);
  }

  // Elements e .. e + N - 1; N is 2, 4 or 8 and divides e, and `aligned(N)` holds.
  template <int N>
  __device__ __forceinline__ void run(int64_t e, const C (&sum)[N]) const {
    uint32_t w[N * sizeof(S) / 4];
    C x[N];
#pragma unroll
    for (int v = 0; v < N; ++v) x[v] = scale * sum[v];
    if (base) {
      S old[N];
      load_words(base + e, w);
      memcpy(old, w, sizeof(w));
#pragma unroll
      for (int v = 0; v < N; ++v) x[v] = widen(old[v]) + scale * sum[v];
    }
    if constexpr (sizeof(S) != 2) {
      memcpy(w, x, sizeof(w));
    } else if (stochastic) {
      round_pairs(e, x, w);
    } else {
#pragma unroll
      for (int v = 0; v < N; v += 2) w[v / 2] = pack<S>(x[v], x[v + 1]);
    }
    store_words(out + e, w);
  }

 private:
  template <int N>
  __device__ __forceinline__ void round_pairs(int64_t e, const C (&x)[N],
                                              uint32_t (&w)[N / 2]) const {
    Counter4 words = {};
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const uint64_t at = static_cast<uint64_t>(e) + v;
      if (v % 4 == 0) words = rounding_words(seed, at >> 2);  // four elements share a draw
      const uint32_t u = N % 4 == 0 ? words.v[v % 4] : word_of_element(words, at);
      const uint32_t bits = round_stochastic(x[v], u, S{}).bits;
      w[v / 2] = v % 2 ? w[v / 2] | bits << 16 : bits;
    }
  }
};

}  // namespace cuda
}  // namespace randlora
