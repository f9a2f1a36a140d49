// Vectors of one instruction set, written with the compilers' own vector extensions so that one
// source serves AVX-512, AVX2, SSE2 and NEON. Compiled once per set: see isa_*.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../core/dtype.h"
#include "../core/host_device.h"
#if defined(__FMA__)  // AVX2 and up
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef RANDLORA_ISA
#error "define RANDLORA_ISA and RANDLORA_VECTOR_BYTES before including a kernel header"
#endif

#define RANDLORA_INLINE RANDLORA_HD
// For lambdas in hot loops: without inlining, their accumulators would live in memory.
#define RANDLORA_INLINED __attribute__((always_inline))
namespace randlora::RANDLORA_ISA {

constexpr int kVectorBytes = RANDLORA_VECTOR_BYTES;

// fn(integral_constant<0>), ..., fn(integral_constant<Count - 1>): a loop that is always unrolled,
// so that arrays of vectors indexed by it live in registers.
template <class F, int... I>
RANDLORA_INLINE void unrolled(const F& fn, std::integer_sequence<int, I...>) {
  (fn(std::integral_constant<int, I>{}), ...);
}
template <int Count, class F>
RANDLORA_INLINE void unrolled(const F& fn) {
  unrolled(fn, std::make_integer_sequence<int, Count>{});
}

template <class C, int Bytes>
struct VecOf {
  typedef C type __attribute__((vector_size(Bytes)));
};
template <class C, int Bytes = kVectorBytes>
using Vec = typename VecOf<C, Bytes>::type;

template <class Vector, class Element>
RANDLORA_INLINE Vector load(const Element* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(Vector));
  return v;
}
template <class Vector, class Element>
RANDLORA_INLINE void store(Element* p, Vector v) {
  __builtin_memcpy(p, &v, sizeof(Vector));
}

// c + a * b, rounded once if the set has fused instructions. Compilers decide loop by loop whether
// to fuse, so without this a token's last bit would depend on the tile and block width that
// computed it.
#if defined(__FMA__)
template <class Vector>
RANDLORA_INLINE Vector fused(Vector a, Vector b, Vector c) {
  constexpr bool is_double = sizeof(c[0]) == 8;
  if constexpr (sizeof(Vector) == 16 && is_double)
    return (Vector)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
  if constexpr (sizeof(Vector) == 16 && !is_double)
    return (Vector)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  if constexpr (sizeof(Vector) == 32 && is_double)
    return (Vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  if constexpr (sizeof(Vector) == 32 && !is_double)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64 && is_double)
    return (Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  if constexpr (sizeof(Vector) == 64 && !is_double)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
}
#elif defined(__aarch64__)
template <class Vector>
RANDLORA_INLINE Vector fused(Vector a, Vector b, Vector c) {
  if constexpr (sizeof(c[0]) == 8)
    return (Vector)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  else
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else  // no fused instruction, so nothing to decide
template <class Vector>
RANDLORA_INLINE Vector fused(Vector a, Vector b, Vector c) {
  return c + a * b;
}
#endif
// c plus a times the scalar.
template <class Vector, class C>
RANDLORA_INLINE Vector add_product(Vector c, C scalar, Vector a) {
  return fused(scalar - Vector{}, a, c);  // broadcasts it: compilers may drop "- 0", but not "+ 0"
}

// ---- storage types: `lanes` consecutive elements widened to the compute type, and back ----------

RANDLORA_INLINE float widen(float v) { return v; }
RANDLORA_INLINE double widen(double v) { return v; }
RANDLORA_INLINE float widen(bf16 v) { return float_of_bits(uint32_t{v.bits} << 16); }
RANDLORA_INLINE float widen(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // Shift exponent and mantissa into place, then let one multiplication by 2^112 rebias the
  // exponent; it also normalises subnormals. Only inf and NaN need their exponent set by hand.
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const float magnitude = float_of_bits(uint32_t{v.bits & 0x7fffu} << 13) * 0x1p112f;
  const uint32_t special = (v.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of_bits(sign | bits_of_float(magnitude) | special);
#endif
}

RANDLORA_INLINE void narrow(float v, float* to) { *to = v; }
RANDLORA_INLINE void narrow(double v, double* to) { *to = v; }
RANDLORA_INLINE void narrow(float v, bf16* to) {
  const uint32_t bits = bits_of_float(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(v != v ? (bits >> 16) | 0x40u : rounded);
}
RANDLORA_INLINE void narrow(float v, f16* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(v, 0));
#else
  uint32_t bits = bits_of_float(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) {  // 2^16 and more, inf, NaN
    to->bits = static_cast<uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
    return;
  }
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 makes the FPU round at the right place
    bits = bits_of_float(float_of_bits(bits) + 0.5f);
    to->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    return;
  }
  bits += 0xc8000fffu + (bits >> 13 & 1u);  // rebias, round to nearest even; may carry to inf
  to->bits = static_cast<uint16_t>(sign | bits >> 13);
#endif
}

template <class Vector, class S>
RANDLORA_INLINE Vector load_as(const S* p) {
  using C = ComputeOf<S>;
  constexpr int lanes = sizeof(Vector) / sizeof(C);
  if constexpr (sizeof(S) == sizeof(C)) {
    return load<Vector>(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 16) {
    return (Vector)_mm512_cvtph_ps(load<__m256i>(p));
#endif
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 8) {
    return (Vector)_mm256_cvtph_ps(load<__m128i>(p));
#endif
  } else if constexpr (std::is_same_v<S, bf16>) {
    const auto bits = load<Vec<uint16_t, sizeof(Vector) / 2>>(p);
    return (Vector)(__builtin_convertvector(bits, Vec<uint32_t, sizeof(Vector)>) << 16);
  } else {
    C wide[lanes];
    for (int l = 0; l < lanes; ++l) wide[l] = widen(p[l]);
    return load<Vector>(wide);
  }
}

template <class Vector, class S>
RANDLORA_INLINE void store_as(S* p, Vector v) {
  using C = ComputeOf<S>;
  constexpr int lanes = sizeof(Vector) / sizeof(C);
  if constexpr (sizeof(S) == sizeof(C)) {
    store(p, v);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 16) {
    store(p, _mm512_cvtps_ph((__m512)v, 0));
#endif
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 8) {
    store(p, _mm256_cvtps_ph((__m256)v, 0));
#endif
  } else if constexpr (std::is_same_v<S, bf16>) {
    using Bits = Vec<uint32_t, sizeof(Vector)>;
    const Bits bits = (Bits)v, high = bits >> 16, is_nan = (Bits)(v != v);
    const Bits rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    const Bits result = (is_nan & (high | 0x40u)) | (~is_nan & rounded);
    store(p, __builtin_convertvector(result, Vec<uint16_t, sizeof(Vector) / 2>));
  } else {
    C wide[lanes];
    store(wide, v);
    for (int l = 0; l < lanes; ++l) narrow(wide[l], p + l);
  }
}

// Defines the kernel `name`, which calls name_as<S> for the storage type S of its dtype.
#define RANDLORA_BY_DTYPE(name, Operator)                                            \
  inline void name(const Operator& p, Runtime& rt) {                                 \
    with_dtype(p.dtype, [&](auto storage) { name##_as<decltype(storage)>(p, rt); }); \
  }

// ---- transposing a square of numbers held in as many vectors as each has lanes -----------------

// Lane l of the result is lane Lane[l] of a, or Lane[l] - lanes of b.
template <int... Lane, class Vector>
RANDLORA_INLINE Vector shuffle(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  using Mask = Vec<std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>, sizeof(Vector)>;
  return __builtin_shuffle(a, b, Mask{Lane...});
#endif
}

// a keeps its lanes with bit Apart clear and takes b's partner lanes for the rest; b the other way.
template <int Apart, int Lanes, class Vector, int... I>
RANDLORA_INLINE void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
  const Vector low = shuffle<(I & Apart ? Lanes + I - Apart : I)...>(a, b);
  b = shuffle<(I & Apart ? Lanes + I : I + Apart)...>(a, b);
  a = low;
}

template <int Lanes, class Vector, int Apart = 1>
RANDLORA_INLINE void transpose(Vector (&m)[Lanes]) {
  unrolled<Lanes>([&](auto r) {
    if constexpr ((r & Apart) == 0)
      exchange<Apart, Lanes>(m[r], m[r + Apart], std::make_integer_sequence<int, Lanes>{});
  });
  if constexpr (2 * Apart < Lanes) transpose<Lanes, Vector, 2 * Apart>(m);
}

}  // namespace randlora::RANDLORA_ISA
