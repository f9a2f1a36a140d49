// The passes over rows in scratch memory that hadamard_up.cu and hadamard_down.cu share.
#include "../device/launch.h"
#include "mix.h"
#include "scratch.h"

namespace randlora::cuda {
namespace {

template <class S, class C = typename ComputeOf<S>::type>
__global__ void __launch_bounds__(kScratchThreads, 1)
    hadamard_mix_kernel(HadamardSizes sizes, const void* z, int64_t T, C* mixed, int log,
                        int64_t t0, int64_t tokens) {
  write_mixed<S>(sizes, z, T, Rows<C, true>{mixed}, log, t0, tokens, share_of_grid());
}

template <bool Up, class C>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_low_kernel(Diagonal<C> diagonal, C* scratch, C* mixed, int log, int64_t tokens) {
  const int64_t N = int64_t{1} << log;
  const auto apply = [&](auto& v, int64_t x) { diagonal.apply(v, x & (N - 1)); };
  low_pass(
      Rows<C, true>{scratch}, tokens << log, share_of_grid(),
      [&](auto& v, int64_t x) {
        if constexpr (Up) apply(v, x);
      },
      [&](auto& v, int64_t x) {
        if (!Up && mixed)
          for (int e = 0; e < kValues<C>; ++e) mixed[x + e] *= v[e];
        if constexpr (!Up) apply(v, x);
      });
}

template <class C>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_pass_kernel(C* numbers, int bit, int bits, int64_t count) {
  middle_pass(Rows<C, true>{numbers}, bit, bits, count, share_of_grid());
}

}  // namespace

template <class C>
template <class S>
void InScratch<C>::mix(const HadamardSizes& sizes, const void* z, int64_t T, C* mixed, int64_t t0,
                       int64_t tokens) {
  start("hadamard_mix", hadamard_mix_kernel<S>, blocks(tokens * sizes.n), sizes, z, T, mixed, log,
        t0, tokens);
}

template <class C>
template <bool Up>
void InScratch<C>::low(const Diagonal<C>& diagonal, C* mixed, int64_t tokens) {
  start("hadamard_low", hadamard_low_kernel<Up, C>, of_numbers(tokens), diagonal, numbers, mixed,
        log, tokens);
}

template <class C>
void InScratch<C>::transform(int edge, int64_t tokens) {
  const Middle<C> middle(log, edge);
  for (int s = 0; s < middle.passes; ++s)
    start("hadamard_pass", hadamard_pass_kernel<C>, of_numbers(tokens), numbers, middle.begin(s),
          middle.begin(s + 1) - middle.begin(s), tokens << log);
}

#define RANDLORA_MIX(S)                                                                           \
  template void InScratch<ComputeOf<S>::type>::mix<S>(const HadamardSizes&, const void*, int64_t, \
                                                      ComputeOf<S>::type*, int64_t, int64_t);
RANDLORA_MIX(float)
RANDLORA_MIX(double)
RANDLORA_MIX(bf16)
RANDLORA_MIX(f16)
#undef RANDLORA_MIX
#define RANDLORA_PASSES(C)                                                 \
  template void InScratch<C>::low<true>(const Diagonal<C>&, C*, int64_t);  \
  template void InScratch<C>::low<false>(const Diagonal<C>&, C*, int64_t); \
  template void InScratch<C>::transform(int, int64_t);
RANDLORA_PASSES(float)
RANDLORA_PASSES(double)
#undef RANDLORA_PASSES

}  // namespace randlora::cuda
