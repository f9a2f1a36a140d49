// Stochastic rounding to 16 bits, reproducible: element e of a tensor draws word e % 4 of Philox
// block e / 4 under the caller's seed. CPU and CUDA share this code, so both round alike.
//
// x lies between two neighbours of the 16-bit type, down (towards zero) and up; it becomes up with
// probability (|x| - |down|) / (|up| - |down|), so the expected result is x itself.
#pragma once
#include "dtype.h"
#include "host_device.h"
#include "ternary_spec.h"

namespace randlora {

// The words of elements 4 * block .. 4 * block + 3.
RANDLORA_HD Counter4 rounding_words(uint64_t seed, uint64_t block) {
  return philox4x32_10(counter_of(kRoleRounding, uint32_t(block >> 32), uint32_t(block)),
                       key0_of(seed), key1_of(seed));
}

// Word e % 4 by selection: registers cannot be indexed.
RANDLORA_HD uint32_t word_of_element(const Counter4& words, uint64_t e) {
  const uint32_t low = e & 1 ? words.v[1] : words.v[0], high = e & 1 ? words.v[3] : words.v[2];
  return e & 2 ? high : low;
}

RANDLORA_HD uint32_t rounding_word(uint64_t seed, uint64_t e) {
  return word_of_element(rounding_words(seed, e >> 2), e);
}

// The same words for code that visits elements in order: draws each Philox block once.
class RoundingWords {
 public:
  RANDLORA_HOST_MEMBER explicit RoundingWords(uint64_t seed) : seed_(seed) {}
  RANDLORA_HOST_MEMBER uint32_t operator()(uint64_t e) {
    if (e >> 2 != block_) {
      block_ = e >> 2;
      words_ = rounding_words(seed_, block_);
    }
    return word_of_element(words_, e);
  }

 private:
  uint64_t seed_, block_ = ~uint64_t{0};  // no element has this block
  Counter4 words_ = {};
};

// `u` is the random word. NaN and infinity are unchanged. The upper neighbour of the largest finite
// value is the next power of two, stored as infinity. Between the two, x becomes infinity with the
// usual probability; beyond, always. No early returns: on a GPU selections cost less than branches.
RANDLORA_HD bf16 round_stochastic(float x, uint32_t u, bf16) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  // The neighbours differ by 2^16 in the bits of a float, subnormal or not.
  const uint32_t finite = (bits + (u >> 16)) >> 16;
  const uint32_t special = bits >> 16 | (magnitude > 0x7f800000u ? 0x0040u : 0u);
  return bf16{static_cast<uint16_t>(magnitude < 0x7f800000u ? finite : special)};
}

RANDLORA_HD f16 round_stochastic(float x, uint32_t u, f16) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  // Normal in f16: ten mantissa bits, exponent re-biased.
  const uint32_t normal = (magnitude + (u >> 19) - 0x38000000u) >> 13;
  // Subnormal in f16: a multiple of 2^-24, and |x| * 2^24 < 1024 is exact in a float.
  const bool small = magnitude < 0x38800000u;
  const float scaled = small ? float_of_bits(magnitude) * 16777216.0f : 0.0f;
  const uint32_t down = static_cast<uint32_t>(scaled);
  const float rest = scaled - static_cast<float>(down);
  const bool up = u < static_cast<uint32_t>(rest * 4294967296.0f);  // exact if rest >= 2^-8
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = small                     ? down + up
                          : magnitude < 0x47800000u ? normal  // 65536
                                                    : special;
  return f16{static_cast<uint16_t>((bits >> 16 & 0x8000u) | result)};
}

}  // namespace randlora
