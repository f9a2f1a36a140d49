// Converts a ternary matrix between dense, bit-plane and list forms, once per basis.
#pragma once
#include "../core/operators.h"

namespace randlora {

// Packs a dense (rows, cols) matrix whose elements are all in {-a, 0, +a} into planes. Returns a (0
// if the matrix is zero), or a negative number if it is not ternary; `bad` is then the first
// offending element.
double pack_dense(const void* dense, DType dtype, int64_t rows, int64_t cols, uint64_t* plus,
                  uint64_t* minus, int64_t* bad, Runtime& rt);

// Fills in offset[0], and offset[2q + 1] and offset[2q + 2] for each line q (a row, or a column if
// by_column). Returns the number of non-zeros.
int64_t count_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                    int64_t* offset, Runtime& rt);
// Fills in the positions, given offsets from count_lists; uint32 if `wide`, else uint16.
void fill_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                const int64_t* offset, bool wide, void* index, Runtime& rt);

// out (rows, cols) = value * ternary element.
void planes_to_dense(const Planes& planes, int64_t rows, int64_t cols, double value, void* out,
                     DType dtype, Runtime& rt);
void lists_to_dense(const AnyLists& lists, int64_t rows, int64_t cols, double value, void* out,
                    DType dtype, Runtime& rt);

}  // namespace randlora
