// The last step of operators that add to a matrix: a sum in the compute type becomes an element,
// out[e] = round(base[e] + scale * sum), to nearest or stochastically.
#pragma once
#include "../../core/stochastic.h"
#include "element.h"
#include "ptx.h"

namespace randlora {

// One access of 8 or 16 bytes.
template <int Words>
__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[Words]) {
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
  if constexpr (Words == 2) *static_cast<uint64_t*>(p) = uint64_t{w[1]} << 32 | w[0];
  if constexpr (Words == 4) store16(p, w[0], w[1], w[2], w[3]);
}

// Unless Seeded it always rounds to nearest.
template <class S_, bool Seeded = sizeof(S_) == 2>
struct RoundedStore {
  using S = S_;
  using C = ComputeOf<S>;
  S* out;
  const S* base;  // null for none; may be `out` itself
  C scale;
  bool stochastic = false;
  uint64_t seed = 0;

  // P is DeltaWeight, HadamardWeight or AddRounded.
  template <class P>
  static RoundedStore of(const P& p, double scale) {
    return {static_cast<S*>(p.out), static_cast<const S*>(p.base), static_cast<C>(scale),
            p.stochastic, p.rounding_seed};
  }

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
    if constexpr (Seeded)
      if (stochastic) {
        out[e] = round_stochastic(x, rounding_word(seed, static_cast<uint64_t>(e)), S{});
        return;
      }
    out[e] = narrow<S>(x);
  }

  // Elements e .. e + N - 1, of 8 or 16 bytes together; N divides e, and `aligned(N)` holds.
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
    } else if (Seeded && stochastic) {
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
    static_assert(N % 4 == 0, "whole draws");
    Counter4 words = {};
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const uint64_t at = static_cast<uint64_t>(e) + v;
      if (v % 4 == 0) words = rounding_words(seed, at >> 2);  // four elements share a draw
      const uint32_t bits = round_stochastic(x[v], words.v[v % 4], S{}).bits;
      w[v / 2] = v % 2 ? w[v / 2] | bits << 16 : bits;
    }
  }
};

}  // namespace randlora
