// SHA-256 (FIPS 180-4) for tests: the vector file holds digests of slices too large to spell out.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace sha256 {

inline uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

// The standard's constants are the first 32 fraction bits of square roots (initial state) and cube
// roots (rounds) of the first primes. All roots are below 8, so 35 correct bits are enough and a
// double would do. The caller checks the result against the published digest of "abc".
inline uint32_t fraction_bits(long double root) {
  return static_cast<uint32_t>((root - std::floor(root)) * 4294967296.0L);
}

inline std::array<uint32_t, 64> round_constants() {
  std::array<uint32_t, 64> constants{};
  for (uint32_t prime = 2, found = 0; found < 64; ++prime) {
    bool composite = false;
    for (uint32_t q = 2; q * q <= prime; ++q) composite |= prime % q == 0;
    if (composite) continue;
    constants[found++] = fraction_bits(std::cbrt(static_cast<long double>(prime)));
  }
  return constants;
}

inline std::array<uint32_t, 8> initial_state() {
  std::array<uint32_t, 8> state{};
  const uint32_t primes[8] = {2, 3, 5, 7, 11, 13, 17, 19};
  for (int i = 0; i < 8; ++i) {
    state[i] = fraction_bits(std::sqrt(static_cast<long double>(primes[i])));
  }
  return state;
}

inline void compress(std::array<uint32_t, 8>& state, const uint8_t* chunk,
                     const std::array<uint32_t, 64>& k) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = static_cast<uint32_t>(chunk[4 * i]) << 24 |
           static_cast<uint32_t>(chunk[4 * i + 1]) << 16 |
           static_cast<uint32_t>(chunk[4 * i + 2]) << 8 | chunk[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
    const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  std::array<uint32_t, 8> s = state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t big1 = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
    const uint32_t choose = (s[4] & s[5]) ^ (~s[4] & s[6]);
    const uint32_t t1 = s[7] + big1 + choose + k[i] + w[i];
    const uint32_t big0 = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
    const uint32_t t2 = big0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

inline std::string digest(std::vector<uint8_t> bytes) {
  const uint64_t bits = static_cast<uint64_t>(bytes.size()) * 8;
  bytes.push_back(0x80);
  while (bytes.size() % 64 != 56) bytes.push_back(0);
  for (int shift = 56; shift >= 0; shift -= 8) bytes.push_back(static_cast<uint8_t>(bits >> shift));
  const std::array<uint32_t, 64> k = round_constants();
  std::array<uint32_t, 8> state = initial_state();
  for (size_t at = 0; at < bytes.size(); at += 64) compress(state, &bytes[at], k);
  std::string text;
  for (const uint32_t word : state) {
    char buffer[9];
    std::snprintf(buffer, sizeof buffer, "%08x", word);
    text += buffer;
  }
  return text;
}

}  // namespace sha256
