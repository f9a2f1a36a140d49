// Generation of balanced bases from their specification, and their conversion to bit planes. Both run
// once per basis.
#pragma once
#include "../core/operators.h"

namespace randlora {

// Lines [line_start, line_start + lines) of role's matrix, to r * n columns. The lines of A are its
// columns, with n = 1.
struct FillBalanced {
  uint64_t seed;
  uint32_t role;
  int64_t line_start, lines, r, q, n;
  bool wide;
  int64_t* offset;  // (r + 1)
  void* row;        // (lines * q)
  uint32_t* sign;   // (lines * q, sign_words_of(n))
};

void fill_balanced(const FillBalanced& p, Runtime& rt);

// planes (2, rows, words_of(r * n)).
void balanced_to_planes(const Balanced& b, int64_t rows, int64_t r, int64_t n, uint64_t* plus,
                        uint64_t* minus, Runtime& rt);

}  // namespace randlora
