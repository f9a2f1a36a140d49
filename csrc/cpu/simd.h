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

// fn(integral_constant<0>), ..., fn(integral_constant<N - 1>): a loop that is always unrolled, so
// that arrays of vectors indexed by it live in registers.
template <class F, int... I>
RANDLORA_INLINE void unrolled(const F& fn, std::integer_sequence<int, I...>) {
  (fn(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
RANDLORA_INLINE void unrolled(const F& fn) {
  unrolled(fn, std::make_integer_sequence<int, N>{});
}

template <class C, int Bytes>
struct VecOf {
  typedef C type __attribute__((vector_size(Bytes)));
};
template <class C, int Bytes = kVectorBytes>
using Vec = typename VecOf<C, Bytes>::type;

template <class V, class T>
RANDLORA_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
RANDLORA_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// c + a * b, rounded once if the set has fused instructions. Compilers decide loop by loop whether
// to fuse, so without this a token's last bit would depend on the tile and block width that
// computed it.
#if defined(__FMA__)
template <class V>
RANDLORA_INLINE V fused(V a, V b, V c) {
  constexpr bool is_double = sizeof(c[0]) == 8;
  if constexpr (sizeof(V) == 16 && is_double)
    return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
  if constexpr (sizeof(V) == 16 && !is_double)
    return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  if constexpr (sizeof(V) == 32 && is_double)
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  if constexpr (sizeof(V) == 32 && !is_double)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && is_double)
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  if constexpr (sizeof(V) == 64 && !is_double)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
}
#elif defined(__aarch64__)
template <class V>
RANDLORA_INLINE V fused(V a, V b, V c) {
  if constexpr (sizeof(c[0]) == 8)
    return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  else
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else  // no fused instruction, so nothing to decide
template <class V>
RANDLORA_INLINE V fused(V a, V b, V c) {
  return c + a * b;
}
#endif
// c plus a times the scalar s.
template <class V, class C>
RANDLORA_INLINE V add_product(V c, C s, V a) {
  return fused(s - V{}, a, c);  // broadcasts s: compilers may drop "- 0", but not "+ 0"
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

template <class V, class S>
RANDLORA_INLINE V load_as(const S* p) {
  using C = ComputeOf<S>;
  constexpr int lanes = sizeof(V) / sizeof(C);
  if constexpr (sizeof(S) == sizeof(C)) {
    return load<V>(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 16) {
    return (V)_mm512_cvtph_ps(load<__m256i>(p));
#endif
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<S, f16> && lanes == 8) {
    return (V)_mm256_cvtph_ps(load<__m128i>(p));
#endif
  } else if constexpr (std::is_same_v<S, bf16>) {
    const auto bits = load<Vec<uint16_t, sizeof(V) / 2>>(p);
    return (V)(__builtin_convertvector(bits, Vec<uint32_t, sizeof(V)>) << 16);
  } else {
    C wide[lanes];
    for (int l = 0; l < lanes; ++l) wide[l] = widen(p[l]);
    return load<V>(wide);
  }
}

template <class V, class S>
RANDLORA_INLINE void store_as(S* p, V v) {
  using C = ComputeOf<S>;
  constexpr int lanes = sizeof(V) / sizeof(C);
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
    using Bits = Vec<uint32_t, sizeof(V)>;
    const Bits bits = (Bits)v, high = bits >> 16, is_nan = (Bits)(v != v);
    const Bits rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    const Bits result = (is_nan & (high | 0x40u)) | (~is_nan & rounded);
    store(p, __builtin_convertvector(result, Vec<uint16_t, sizeof(V) / 2>));
  } else {
    C wide[lanes];
    store(wide, v);
    for (int l = 0; l < lanes; ++l) narrow(wide[l], p + l);
  }
}

// Defines the kernel `name`, which calls name_as<S> for the storage type S of its dtype.
#define RANDLORA_BY_DTYPE(name, Operator)                                \
  inline void name(const Operator& p, Runtime& rt) {                     \
    with_dtype(p.dtype, [&](auto s) { name##_as<decltype(s)>(p, rt); }); \
  }

// ---- transposing an L x L square held in L vectors ----------------------------------------------

// Lane l of the result is lane Lane[l] of a, or Lane[l] - lanes of b.
template <int... Lane, class V>
RANDLORA_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  using M = Vec<std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>, sizeof(V)>;
  return __builtin_shuffle(a, b, M{Lane...});
#endif
}

// a keeps its lanes with bit S clear and takes b's partner lanes for the rest; b the other way.
template <int S, int L, class V, int... I>
RANDLORA_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  const V low = shuffle<(I & S ? L + I - S : I)...>(a, b);
  b = shuffle<(I & S ? L + I : I + S)...>(a, b);
  a = low;
}

template <int L, class V, int S = 1>
RANDLORA_INLINE void transpose(V (&m)[L]) {
  unrolled<L>([&](auto r) {
    if constexpr ((r & S) == 0)
      exchange<S, L>(m[r], m[r + S], std::make_integer_sequence<int, L>{});
  });
  if constexpr (2 * S < L) transpose<L, V, 2 * S>(m);
}

}  // namespace randlora::RANDLORA_ISA
