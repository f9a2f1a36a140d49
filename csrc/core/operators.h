// The operators as plain structs of raw pointers and 64-bit sizes, independent of torch.
// csrc/torch has validated every field, so kernels check nothing.
//
// Letters (docs/math.md): T tokens, D = max(in, out), d = min(in, out), r rows of A, n copies of
// each, K = r * n.
// Column c of B belongs to rank index j = c / n and copy i = c % n.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "hadamard.h"
#include "packed.h"
#include "runtime.h"

namespace randlora {

// Ternary bases A and B, packed. A is always stored as lists by row, B as bit planes or, if
// those are empty, as lists by row and by column.
struct TernaryBases {
  int64_t D = 0, d = 0, r = 0, n = 0;
  Lists a;          // r lines over d
  Lists b_rows;     // D lines over K
  Lists b_cols;     // K lines over D
  Planes b_planes;  // (D, K)
  // CUDA, optional: the support_tables of `a`. Without them, every call computes the tables.
  const int32_t* a_tables = nullptr;

  RANDLORA_HD_MEMBER int64_t K() const { return r * n; }
  RANDLORA_HD_MEMBER bool has_planes() const { return b_planes.plus != nullptr; }
};

// support_numbers is the length of A's support tables (csrc/cuda): support_room entries in column
// order, each rank index padded to whole groups, and then (r, d) places.
constexpr int kSupportGroup = 32;
RANDLORA_HD int64_t support_room(int64_t entries, int64_t r) {
  return (entries / kSupportGroup + r) * kSupportGroup;
}
RANDLORA_HD int64_t support_numbers(int64_t entries, int64_t r, int64_t d) {
  return support_room(entries, r) + r * d;
}

// Fills row q of both planes with the signs of row row_start + q of A or B, as `role` says, in
// `cols` columns from col_start on (docs/basis-spec.md).
struct FillPlanes {
  uint64_t seed;
  uint32_t role, threshold;
  int64_t row_start, rows, col_start, cols;
  uint64_t *plus, *minus;  // (rows, words_of(cols))
};

//   out[c, k] = lam[j, i] * A[j, k] * gam[i, k]
struct ScaledBasis {
  int64_t r, n, d;
  const void *A, *lam, *gam;  // (r, d), (r, n), (n, d) in the compute type
  void* out;                  // (K, d) in `dtype`
  DType dtype;
};

//   dlam[j, i] = sum over k of grad A gam
//   dgam[i, k] = sum over j of grad A lam
struct ScaledBasisBackward {
  int64_t r, n, d;
  const void *A, *lam, *gam;
  const void* grad;   // (K, d) in `dtype`
  void *dlam, *dgam;  // compute type
  DType dtype;
};

// A product with dW, to += scale * ..., or to = ... unless `accumulate`:
//   up    from (T, d), to (T, D):   V = from A'^T (T, K);  to += scale * V B^T
//   down  from (T, D), to (T, d):   U = from B    (T, K);  to += scale * U A'
// A layer is one of the two, and the other makes dx of dy. That one also makes dlam and dgam, both
// or neither, if `other` is x; then `to` may be null.
struct IndependentLinear {
  TernaryBases basis;
  const void *lam, *gam, *from;
  void* to;
  DType dtype;
  int64_t T;
  double scale;
  bool up, accumulate;
  const void* other = nullptr;
  void *dlam = nullptr, *dgam = nullptr;  // compute type
};

// Packs a dense matrix into planes, and reports whether its elements are all -a, 0 or a. CPU only.
struct PackReport {
  double a;      // magnitude of the first element that is not zero; 0 if all are zero
  uint64_t bad;  // the first element that is none of -a, 0, a; rows * cols if there is none
};
struct PackDense {
  const void* dense;
  DType dtype;
  int64_t rows, cols;
  uint64_t *plus, *minus;  // (rows, words_of(cols))
  PackReport* report;
};

// Fills in the offsets of lists by row or by column; the last is the number of entries.
struct CountLists {
  Planes planes;
  int64_t rows, cols;
  bool by_column;
  int64_t* offset;  // 2 * lines() + 1

  RANDLORA_HD_MEMBER int64_t lines() const { return by_column ? cols : rows; }
};
// Fills in the positions, given those offsets.
struct FillLists : CountLists {
  uint16_t* index;  // as many as there are entries
};

// out (rows, cols) = value * ternary element, in `dtype`.
struct PlanesToDense {
  Planes planes;
  int64_t rows, cols;
  double value;
  void* out;
  DType dtype;
};

// The operators that CPU and CUDA both have, each with its struct. Every table of functions is made
// from this list.
#define RANDLORA_OPERATORS(X)                               \
  X(count_lists, CountLists)                                \
  X(fill_lists, FillLists)                                  \
  X(planes_to_dense, PlanesToDense)                         \
  X(fill_planes, FillPlanes)                                \
  X(scaled_basis, ScaledBasis)                              \
  X(scaled_basis_backward, ScaledBasisBackward)             \
  X(independent_linear, IndependentLinear)                  \
  X(hadamard_signed_diagonals, HadamardSignedDiagonals)     \
  X(hadamard_diagonal_gradients, HadamardDiagonalGradients) \
  X(hadamard_up, HadamardUp)                                \
  X(hadamard_down, HadamardDown)                            \
  X(hadamard_weight, HadamardWeight)                        \
  X(hadamard_weight_backward, HadamardWeightBackward)

// What a macro stands for, as text.
#define RANDLORA_TEXT_OF(...) #__VA_ARGS__
#define RANDLORA_TEXT(...) RANDLORA_TEXT_OF(__VA_ARGS__)

// The CPU kernels, compiled for one instruction set.
struct Kernels {
  const char* isa;
#define RANDLORA_MEMBER(name, Operator) void (*name)(const Operator&, Runtime&);
  RANDLORA_OPERATORS(RANDLORA_MEMBER)
#undef RANDLORA_MEMBER
  // Only the CPU has these.
  void (*hadamard_add)(const HadamardAdd&, Runtime&);
  void (*pack_dense)(const PackDense&, Runtime&);
};

}  // namespace randlora
