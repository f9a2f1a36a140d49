// Tests stochastic rounding (core/stochastic.h) against plain doubles: expectation, neighbours,
// exact values, the edges of both 16-bit types, and the words it draws.
#include <cmath>
#include <limits>

#include "check.h"
#include "core/stochastic.h"

using namespace randlora;

namespace {

template <class S>
constexpr int kInfinity = std::is_same_v<S, bf16> ? 0x7f80 : 0x7c00;

// Rounds x, which lies between `down` and the next number in magnitude, with `words` evenly spread
// words. The result must be one of the two, and the share of `up` must make the mean x.
template <class S>
void expectation(float x, int words = 1 << 16) {
  const double magnitude = std::fabs(double(x));
  int low = 0;
  for (int bit = 1 << 14; bit != 0; bit /= 2)
    if (value_of(S{uint16_t(low | bit)}) <= magnitude) low |= bit;
  const double down = value_of(S{uint16_t(low)}), up = value_of(S{uint16_t(low + 1)});
  const int sign = std::signbit(x) ? 0x8000 : 0;
  int64_t ups = 0;
  for (int w = 0; w < words; ++w) {
    const uint32_t u = uint32_t(w) * uint32_t((uint64_t{1} << 32) / uint64_t(words));
    const int got = round_stochastic(x, u, S{}).bits;
    EXPECT(got == (low | sign) || got == ((low + 1) | sign), "%a gives %04x, down is %04x", x, got,
           low | sign);
    ups += got == ((low + 1) | sign);
  }
  const double want = (magnitude - down) / (up - down), share = double(ups) / words;
  EXPECT(std::fabs(share - want) <= 1.0 / words, "%a: up with %.8f, should be %.8f", x, share,
         want);
  if (magnitude == down) EXPECT(ups == 0, "%a is exact and moved", x);
}

template <class S>
void exact_values() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const S s{uint16_t(bits)};
    if ((bits & 0x7fff) > kInfinity<S>) continue;  // NaN
    const bool infinite = (bits & 0x7fff) == kInfinity<S>;
    const float x = infinite          ? (bits & 0x8000 ? -INFINITY : INFINITY)
                    : (bits & 0x7fff) ? float(value_of(s))
                                      : float_of_bits(uint32_t(bits) << 16);  // the sign of zero
    for (uint32_t u : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xffffffffu})
      EXPECT(round_stochastic(x, u, S{}).bits == bits, "%04x with word %08x", bits, u);
  }
}

template <class S>
void special_values() {
  const float tiny = std::numeric_limits<float>::denorm_min(), big = 3e38f;
  for (uint32_t u : {0u, 0x12345678u, 0xffffffffu})
    for (uint32_t sign : {0u, 0x80000000u}) {
      for (uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu}) {
        const int got = round_stochastic(float_of_bits(nan | sign), u, S{}).bits;
        EXPECT((got & 0x7fff) > kInfinity<S> && (got & 0x8000) == int(sign >> 16),
               "NaN %08x became %04x", nan | sign, got);
      }
      const auto keeps_sign = [&](float x) {
        const int got = round_stochastic(float_of_bits(bits_of_float(x) | sign), u, S{}).bits;
        EXPECT((got & 0x8000) == int(sign >> 16), "sign of %a lost: %04x", x, got);
        return got & 0x7fff;
      };
      EXPECT(keeps_sign(tiny) <= 1, "the smallest float is no more than the smallest number");
      if (std::is_same_v<S, f16>)
        for (float x : {65536.0f, 1e6f, big})
          EXPECT(keeps_sign(x) == 0x7c00, "%a is infinite in f16", x);
      // The largest float lies between the largest bf16 and infinity.
      const int largest = keeps_sign(std::numeric_limits<float>::max());
      EXPECT(largest == kInfinity<S> || (std::is_same_v<S, bf16> && largest == 0x7f7f), "%04x",
             largest);
    }
}

// Checks that element e draws word e % 4 of block e / 4, with 64-bit e and seed, by calling Philox.
void words() {
  const uint64_t seed = 0x0123456789abcdefu;
  RoundingWords in_order(seed);
  for (uint64_t e : {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{3}, uint64_t{4},
                     (uint64_t{1} << 34) + 6, (uint64_t{1} << 60) + 7}) {
    const Counter4 out = philox4x32_10(Counter4{{uint32_t(e / 4), uint32_t(e / 4 >> 32), 2, 1}},
                                       0x89abcdefu, 0x01234567u);
    EXPECT(rounding_word(seed, e) == out.v[e % 4] && in_order(e) == out.v[e % 4],
           "word of element %llu", static_cast<unsigned long long>(e));
  }
}

template <class S>
void all() {
  exact_values<S>();
  special_values<S>();
  std::mt19937 random(7);
  const int lowest = std::is_same_v<S, bf16> ? -140 : -30,
            highest = std::is_same_v<S, bf16> ? 127 : 15;
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  for (int exponent = lowest; exponent <= highest; ++exponent)
    for (int sign : {1, -1}) expectation<S>(sign * std::ldexp(mantissa(random), exponent), 1 << 13);
  // A quarter, a half, and all but the last bit of the way; across a binade; near the least normal
  // number.
  for (float x : {1 + 0x1p-9f, 1 + 0x1p-8f, 1 + 0x1p-11f, 2 - 0x1p-23f, 1 + 0x1p-23f})
    for (float scale : {1.0f, -1.0f, 0x1p-14f, 0x1p-15f, 0x1p-20f, 0x1p-24f, 0x1p-126f})
      expectation<S>(x * scale);
  const double top = value_of(S{uint16_t(kInfinity<S> - 1)}),
               past = value_of(S{uint16_t(kInfinity<S>)});
  for (double way : {0.125, 0.5, 0.75}) expectation<S>(float(top + way * (past - top)));
}

}  // namespace

int main() {
  words();
  all<bf16>();
  all<f16>();
  return finish();
}
