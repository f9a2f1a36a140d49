// out = base + delta, rounded once to 16 bits: W + dW for dense bases.
#pragma once
#include "../core/operators.h"
#include "../core/stochastic.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

template <class S>
void add_rounded_as(const AddRounded& p, Runtime& rt) {
  const S* base = static_cast<const S*>(p.base);
  S* out = static_cast<S*>(p.out);
  rt.split(p.count, 4096, [&](int64_t begin, int64_t end) {
    if (p.stochastic) {
      RoundingWords draw(p.rounding_seed);
      for (int64_t e = begin; e < end; ++e) {
        const float x = base ? widen(base[e]) + p.delta[e] : p.delta[e];
        out[e] = round_stochastic(x, draw(uint64_t(e)), S{});
      }
    } else if (base) {
      for (int64_t e = begin; e < end; ++e) narrow(widen(base[e]) + p.delta[e], out + e);
    } else {
      for (int64_t e = begin; e < end; ++e) narrow(p.delta[e], out + e);
    }
  });
}

inline void add_rounded(const AddRounded& p, Runtime& rt) {
  p.dtype == DType::bf16 ? add_rounded_as<bf16>(p, rt) : add_rounded_as<f16>(p, rt);
}

}  // namespace randlora::RANDLORA_ISA
