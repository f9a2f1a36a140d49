// The basis specification, version 2: balanced bases. The columns of a line (a row of B, a column of A)
// fall into r groups by c % r. Every line has q of them, its support, in which all elements are +1 or
// -1; elsewhere they are 0. docs/balanced-spec.md is the text, tests/balanced_reference.py the NumPy
// reference, and tests/data/basis_v2.txt the vectors that every implementation must reproduce.
#pragma once

#include "ternary_spec.h"

namespace randlora {

constexpr uint32_t kBalancedVersion = 2;  // the fourth counter word

constexpr int64_t kSignsPerBlock = 128;  // of one output of Philox

// Of all groups of a line, the q with the smallest keys are its support; of equal keys the smaller
// group comes first.
RANDLORA_HD uint32_t support_key(uint64_t seed, uint32_t role, uint32_t line, uint32_t group) {
  const Counter4 counter{{group >> 2, line, role, kBalancedVersion}};
  return philox4x32_10(counter, key0_of(seed), key1_of(seed)).v[group & 3];
}

// Signs of a group of a line: bit b of word w is that of its element 128 * block + 32 * w + b, set for
// -1. The third counter word is 2 or more, where that of the keys is a role: 0 or 1.
RANDLORA_HD Counter4 sign_words(uint64_t seed, uint32_t role, uint32_t line, uint32_t group,
                                uint32_t block) {
  const Counter4 counter{{block, line, 2 * group + 2 + role, kBalancedVersion}};
  return philox4x32_10(counter, key0_of(seed), key1_of(seed));
}

}  // namespace randlora
