// The passes over rows in scratch memory that hadamard_up.cu and hadamard_down.cu share.
#include "../device/launch.h"
#include "mix.h"
#include "scratch.h"

namespace randlora::cuda {
namespace {

template <class S, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kScratchThreads, 1)
    hadamard_mix_kernel(HadamardSizes sizes, const void* z, int64_t T, C* mixed, int log,
                        int64_t t0, int64_t tokens) {
  write_mixed<S>(sizes, z, T, Rows<C, true>{mixed}, log, t0, tokens, share_of_grid());
}

template <bool Up, class C>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_low_kernel(Diagonal<C> diagonal, C* scratch, C* mixed, int log, int64_t tokens) {
  low_pass(Rows<C, true>{scratch}, tokens << log, share_of_grid(), [&](auto& v, int64_t x) {
    const int64_t c = x & ((int64_t{1} << log) - 1);
    if constexpr (Up) diagonal.apply(v, c);
    hadamard<1>(v);
    if constexpr (!Up) {
      if (mixed)
        for (int e = 0; e < kValues<C>; ++e) mixed[x + e] *= v[e];
      diagonal.apply(v, c);
    }
  });
}

template <class C>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_pass_kernel(C* numbers, int bit, int bits, int64_t count) {
  middle_pass(Rows<C, true>{numbers}, bit, bits, count, share_of_grid());
}

}  // namespace

template <class C>
void InScratch<C>::mix(const HadamardSizes& sizes, const void* z, DType dtype, int64_t T, C* mixed,
                       int64_t t0, int64_t tokens) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (std::is_same<ComputeOf<S>, C>::value)
      start("hadamard_mix", hadamard_mix_kernel<S>, blocks(tokens * sizes.n), sizes, z, T, mixed,
            log, t0, tokens);
  });
}

template <class C>
void InScratch<C>::low(bool up, const Diagonal<C>& diagonal, C* mixed, int64_t tokens) {
  start("hadamard_low", up ? hadamard_low_kernel<true, C> : hadamard_low_kernel<false, C>,
        of_numbers(tokens), diagonal, numbers, mixed, log, tokens);
}

template <class C>
void InScratch<C>::transform(int edge, int64_t tokens) {
  const Middle<C> middle(log, edge);
  for (int s = 0; s < middle.passes; ++s)
    start("hadamard_pass", hadamard_pass_kernel<C>, of_numbers(tokens), numbers, middle.begin(s),
          middle.begin(s + 1) - middle.begin(s), tokens << log);
}

template struct InScratch<float>;
template struct InScratch<double>;

}  // namespace randlora::cuda
