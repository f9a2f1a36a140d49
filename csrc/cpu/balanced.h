// Generation of balanced bases from their specification, and their conversion to bit planes. Both run
// once per basis.
#pragma once
#include "../core/operators.h"

namespace randlora {

void fill_balanced(const FillBalanced& p, Runtime& rt);

// planes (2, rows, words_of(r * n)).
void balanced_to_planes(const Balanced& b, int64_t rows, int64_t r, int64_t n, uint64_t* plus,
                        uint64_t* minus, Runtime& rt);

}  // namespace randlora
