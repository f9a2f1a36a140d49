// The operators as plain structs of raw pointers and 64-bit sizes, independent of torch.
// csrc/torch has validated every field, so kernels check nothing.
//
// Letters (docs/math.md): T tokens, D = max(in, out), d = min(in, out), r rank, n bases, K = r * n.
// Column c of B belongs to rank index j = c / n and base i = c % n.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "lists.h"
#include "planes.h"
#include "runtime.h"

namespace randlora {

// The packed bases A and B. A is always stored as lists by row. B is stored as bit planes or, if
// those are empty, as lists by row and by column.
struct Basis {
  int64_t D = 0, d = 0, r = 0, n = 0;
  bool wide = false;  // list positions are uint32, not uint16
  AnyLists a;         // r lines over d
  AnyLists b_rows;    // D lines over K
  AnyLists b_cols;    // K lines over D
  Planes b_planes;    // (D, K)
  // CUDA, optional: the support_tables of `a`. Without them, every call computes the tables.
  const int32_t* a_tables = nullptr;
  // CUDA, optional: dense unscaled B (D, K) in the dtype of x. Products with B are then GEMMs.
  const void* b_dense = nullptr;

  RANDLORA_HD_MEMBER int64_t K() const { return r * n; }
  RANDLORA_HD_MEMBER bool has_planes() const { return b_planes.plus != nullptr; }
  RANDLORA_HD_MEMBER bool has_lists() const { return !has_planes(); }
};

// Sizes of block bases (docs/basis-spec.md, section 14), for a whole layer or for a slice with some
// of its chunks of d and of D. A is block diagonal over its chunks of d, as in ScaledBasis. B[o, c]
// is nonzero exactly if o is in the chunk of D that row c belongs to.
//
// c numbers the rows of A', starting at the slice's first chunk of d. e numbers, in the same order,
// only the rows whose chunk of D is in the slice:
//
//   c = e / b_chunks * groups + e % b_chunks + first        chunk of D: e % b_chunks
//
// In a whole layer e equals c. B, V and U have one row per e. The first and the last few e may give
// a c outside [0, K), where A' has no row.
template <class Int>
struct BlockSizesOf {
  Int D, d, r, n;          // for a slice: its features, and the rank indices of its chunks of d
  Int groups;              // G of the layer
  Int a_chunks, b_chunks;  // chunks of d and of D; both are G in a whole layer
  Int first = 0;           // row(0), between -groups and groups

  template <class To>
  BlockSizesOf<To> as() const {
    return {To(D), To(d), To(r), To(n), To(groups), To(a_chunks), To(b_chunks), To(first)};
  }
  RANDLORA_HD_MEMBER Int K() const { return r * n; }
  RANDLORA_HD_MEMBER Int a_rows() const { return K() / a_chunks; }  // rows c per chunk of d
  RANDLORA_HD_MEMBER Int a_width() const { return d / a_chunks; }
  RANDLORA_HD_MEMBER Int b_width() const { return D / b_chunks; }
  RANDLORA_HD_MEMBER Int cycles() const { return (K() - first + groups - 1) / groups; }
  RANDLORA_HD_MEMBER Int rows() const { return cycles() * b_chunks; }
  RANDLORA_HD_MEMBER Int row(Int e) const { return e / b_chunks * groups + e % b_chunks + first; }
  // The number of e with row(e) < c.
  RANDLORA_HD_MEMBER Int before(Int c) const {
    const Int behind = c > first ? c - first : 0, rest = behind % groups;
    return behind / groups * b_chunks + (rest < b_chunks ? rest : b_chunks);
  }
};
using BlockSizes = BlockSizesOf<int64_t>;

struct Blocks : BlockSizes {
  Planes b;         // (rows(), D / b_chunks): B[chunk of D, row(e)], plus plane only
  const int8_t* a;  // (r, d / a_chunks)
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

// The signs of B's blocks (BlockSizes): bit t of row e says whether element (kRoleB,
// chunk * height + t, cycle * groups + chunk) at density 1 is +1. Here chunk is
// first_chunk + e % chunks, and cycle is first_cycle + e / chunks.
struct FillBlocks {
  uint64_t seed;
  int64_t height, groups, first_chunk, chunks, first_cycle, cycles;
  uint64_t* signs;  // (cycles * chunks, words_of(height))

  // row[w]: the row of `signs` that gets output word w of counter l of a group of 64 columns; null
  // if that word's column does not belong to `chunk`.
  RANDLORA_HD_MEMBER void rows_of(int64_t chunk, int64_t group, int64_t l,
                                  uint64_t* (&row)[4]) const {
    const int64_t first = first_cycle * groups, g = first_chunk + chunk;
    for (int w = 0; w < 4; ++w) {
      const int64_t cycle = (group * 64 + 16 * w + l - g - first) / groups;
      const bool inside =
          group * 64 + 16 * w + l == first + cycle * groups + g && cycle >= 0 && cycle < cycles;
      row[w] = inside ? signs + (cycle * chunks + chunk) * words_of(height) : nullptr;
    }
  }
  RANDLORA_HD_MEMBER int64_t first_group() const { return first_cycle * groups / 64; }
  RANDLORA_HD_MEMBER int64_t column_groups() const {
    return words_of((first_cycle + cycles) * groups) - first_group();
  }
};

// A block diagonal over `groups`, which divides r and d, and compact: row j holds only the
// w = d / groups columns of its group h = j / (r / groups).
//
//   out[c, k] = scale * lam[j, i] * A[j, k] * gam[i, h * w + k]
struct ScaledBasis {
  int64_t r, n, d;
  const void *A, *lam, *gam;  // (r, w), (r, n), (n, d) in the compute type
  void* out;                  // (K, w) in `dtype`
  DType dtype;
  int64_t groups = 1;
  double scale = 1.0;
};

//   dlam[j, i] = scale * sum over k of grad A gam
//   dgam[i, h * w + k] = sum over j in group h of grad A (scale lam)
struct ScaledBasisBackward {
  int64_t r, n, d;
  const void *A, *lam, *gam;
  const void* grad;   // (K, w) in `dtype`
  void *dlam, *dgam;  // compute type
  DType dtype;
  int64_t groups = 1;
  double scale = 1.0;
};

// out = base + delta, rounded once to the 16-bit `dtype`. Without a base it only rounds.
struct AddRounded {
  int64_t count;
  const void* base;  // like out, or null
  const float* delta;
  void* out;
  DType dtype;
  // Round stochastically (core/stochastic.h) instead of to nearest.
  bool stochastic;
  uint64_t rounding_seed;
};

// ---- block bases on the CPU, A factored by its classes (csrc/cpu/block_classes.h) --------------

// out[i, k] = scale * in[i, k] * sign of column k, for (rows, d) matrices in the compute type. The
// first row of each group of `a` (r, w) holds the signs, as H's first row is all ones.
struct SignColumns {
  int64_t rows, d, w, q;
  const int8_t* a;
  const void* in;
  void* out;
  DType dtype;  // f32 or f64
  double scale;
};

// For each group of q rank indices and each base i: rows (j, i) of `out` are the Hadamard transform
// of rows (j, i) of `in`. `before` scales the rows of `in`, `after` those of the result.
struct HadamardMix {
  int64_t r, q, n, T, stride;  // in and out: (r * n, T), rows `stride` apart; may be the same
  const void* in;
  void* out;
  const void *before, *after;  // (r, n), or null
  DType dtype;                 // f32 or f64, for all arrays
};

// out[c] += scale * sum over t of a[c, t] * b[c, t]
struct RowDots {
  int64_t rows, T, stride;
  const void *a, *b;
  void* out;
  DType dtype;  // f32 or f64
  double scale;
};

// out = base + scale * B @ A'  (D, d), or its transpose (d, D) when `transposed`.
struct DeltaWeight {
  Basis basis;
  const void *lam, *gam;  // (r, n), (n, d) in the compute type
  const void* base;       // like out, or null; added before the single rounding
  void* out;
  DType dtype;
  double scale;
  bool transposed;
  // 16-bit outputs: round stochastically (core/stochastic.h) instead of to nearest.
  bool stochastic = false;
  uint64_t rounding_seed = 0;
};

// The same for block bases. CUDA only.
struct BlockDelta {
  Blocks blocks;
  const void *lam, *gam;
  const void* base;
  void* out;
  DType dtype;
  double scale;
  bool transposed;
  bool stochastic = false;
  uint64_t rounding_seed = 0;
};

struct DeltaWeightBackward {
  Basis basis;
  const void *lam, *gam;
  const void* grad;  // (D, d), or (d, D) when `transposed`
  DType dtype;
  double scale;
  bool transposed;
  void *dlam, *dgam;  // compute type
};

// y (T, out) += scale * x (T, in) dW^T, or y = ... when not `accumulate`.
//   expand  (d == in):  V = x A'^T (T, K);  y += scale * V B^T
//   reduce  (d == out): U = x B    (T, K);  y += scale * U A'
struct Linear {
  Basis basis;
  const void *lam, *gam;
  const void* x;
  void* y;
  DType dtype;
  int64_t T;
  double scale;
  bool expand, accumulate;
};

// The same for block bases and a few tokens. CUDA only.
struct BlockLinear {
  Blocks blocks;
  const void *lam, *gam;
  const void* x;
  void* y;
  DType dtype;
  int64_t T;
  double scale;
  bool expand, accumulate;
};

// Gradients of Linear from dy (T, out) and x (T, in). dx (T, in) may be null; with `accumulate`,
// the gradient is added to it. dlam and dgam are either both null or both wanted.
struct LinearBackward {
  Basis basis;
  const void *lam, *gam;
  const void *x, *dy;
  void* dx;
  DType dtype;
  int64_t T;
  double scale;
  bool expand, accumulate;
  void *dlam, *dgam;  // compute type
};

// One set of kernels, compiled for one instruction set.
struct Kernels {
  const char* isa;
  void (*fill_planes)(const FillPlanes&, Runtime&);
  void (*fill_blocks)(const FillBlocks&, Runtime&);
  void (*scaled_basis)(const ScaledBasis&, Runtime&);
  void (*scaled_basis_backward)(const ScaledBasisBackward&, Runtime&);
  void (*add_rounded)(const AddRounded&, Runtime&);
  void (*sign_columns)(const SignColumns&, Runtime&);
  void (*hadamard_mix)(const HadamardMix&, Runtime&);
  void (*row_dots)(const RowDots&, Runtime&);
  void (*delta_weight)(const DeltaWeight&, Runtime&);
  void (*delta_weight_backward)(const DeltaWeightBackward&, Runtime&);
  void (*linear)(const Linear&, Runtime&);
  void (*linear_backward)(const LinearBackward&, Runtime&);
};

}  // namespace randlora
