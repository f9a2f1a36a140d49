// Element types of activations and weights as the kernels see them. No torch header here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

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
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

RANDLORA_HD DType compute_dtype(DType t) { return t == DType::f64 ? t : DType::f32; }

RANDLORA_HD int64_t bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// `p`, void* or const void*, moved on by elements of a dtype. Null stays null.
template <class P>
RANDLORA_HD P* moved(P* p, int64_t elements, DType dtype) {
  using Bytes = std::conditional_t<std::is_const_v<P>, const char, char>;
  return p ? static_cast<Bytes*>(p) + elements * bytes_of(dtype) : nullptr;
}

// Calls fn(S{}) for the storage type S of a dtype.
template <class F>
static RANDLORA_HOST_MEMBER void with_dtype(DType dtype, const F& fn) {
  switch (dtype) {
    case DType::f32: return fn(float{});
    case DType::f64: return fn(double{});
    case DType::bf16: return fn(bf16{});
    case DType::f16: return fn(f16{});
  }
}

RANDLORA_HD float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
RANDLORA_HD uint32_t bits_of_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

}  // namespace randlora
