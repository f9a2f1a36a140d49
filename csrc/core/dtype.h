// Element types of activations and weights as the kernels see them. No torch header here.
#pragma once
#include <cstdint>

namespace randlora {

enum class DType : int { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Kernels accumulate in the compute type: double for f64, float for the rest.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

inline int64_t bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

}  // namespace randlora
