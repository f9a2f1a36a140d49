// The last step of delta_weight, one for all formats of B: a sum of B A' in the compute type becomes
// an element of dW, out[e] = round(base[e] + scale * sum), to nearest or stochastically.
#pragma once
#include "../core/operators.h"
#include "../core/stochastic.h"
#include "element.h"

namespace randlora {
namespace cuda {

// N elements in one access.
template <class S, int N>
struct alignas(sizeof(S) * N) Run {
  S v[N];
};

template <class S>
struct DeltaStore {
  using C = typename ComputeOf<S>::type;
  S* out;
  const S* base;  // null for none; may be `out` itself
  C scale;
  bool stochastic;
  uint64_t seed;

  explicit DeltaStore(const DeltaWeight& p)
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

  __device__ __forceinline__ void one(int64_t e, C sum) const {
    const C x = base ? widen(base[e]) + scale * sum : scale * sum;
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
    C x[N];
    Run<S, N> rounded;
#pragma unroll
    for (int v = 0; v < N; ++v) x[v] = scale * sum[v];
    if (base) {
      const auto old = *reinterpret_cast<const Run<S, N>*>(base + e);
#pragma unroll
      for (int v = 0; v < N; ++v) x[v] = widen(old.v[v]) + scale * sum[v];
    }
    bool nearest = true;
    if constexpr (sizeof(S) == 2)
      if (stochastic) {
        nearest = false;
        Counter4 words;
#pragma unroll
        for (int v = 0; v < N; ++v) {
          const uint64_t at = static_cast<uint64_t>(e) + v;
          if (v % 4 == 0) words = rounding_words(seed, at >> 2);  // four elements draw together
          const uint32_t u = N % 4 == 0 ? words.v[v % 4] : word_of_element(words, at);
          rounded.v[v] = round_stochastic(x[v], u, S{});
        }
      }
    if (nearest)
#pragma unroll
      for (int v = 0; v < N; ++v) rounded.v[v] = narrow<S>(x[v]);
    *reinterpret_cast<Run<S, N>*>(out + e) = rounded;
  }
};

}  // namespace cuda
}  // namespace randlora
