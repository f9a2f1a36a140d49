// Every launcher of the CUDA library. They take the structs of csrc/core with device
// pointers and enqueue on device.stream. Only count_lists waits for the card, because the host
// needs its result. Offsets of lists are on the card, so the host knows only the number of entries
// (AnyLists::count).
#pragma once
#include "../core/device.h"
#include "../core/hadamard.h"
#include "../core/operators.h"

namespace randlora {
namespace cuda {

// fill_planes.cu   scaled_basis.cu   add_rounded.cu
// delta_weight.cu  chooses delta_lists.cu or delta_planes.cu by the format of B
// linear.cu        compositions of the products below
// hadamard/*.cu    what surrounds the class products of Hadamard bases (core/hadamard.h)
#define RANDLORA_DECLARE(name, Operator) void name(const Operator& p, Device& device);
RANDLORA_OPERATORS(RANDLORA_DECLARE)
#undef RANDLORA_DECLARE

// packing (lists.cu, dense.cu): the CPU's results, bit for bit
int64_t count_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                    int64_t* offset, Device& device);
void fill_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                const int64_t* offset, bool wide, void* index, Device& device);
void planes_to_dense(const Planes& planes, int64_t rows, int64_t cols, double value, void* out,
                     DType dtype, Device& device);
void lists_to_dense(const AnyLists& lists, bool wide, int64_t rows, int64_t cols, double value,
                    void* out, DType dtype, Device& device);
// found[0] = a, or -1 if the matrix is not ternary; found[1] = the first offending element.
void pack_dense(const void* dense, DType dtype, int64_t rows, int64_t cols, uint64_t* plus,
                uint64_t* minus, double* found, Device& device);

// a_support.cu: fills Basis::a_tables, support_numbers(a.count, r, d) numbers.
void support_tables(const AnyLists& a, bool wide, int64_t r, int64_t d, int32_t* tables,
                    Device& device);

// ---- the products of the factored path, all matrices row-major in `dtype` -----------------------

// a_*.cu       up:    V (T, K) = scale * z (T, d) A'^T
//              down:  out (T, d) = scale * U (T, K) A' [+ out]
//              grad:  dlam, dgam from P = scale * U^T z (docs/math.md, section 4)
struct ASide {
  const Basis& basis;
  const void *lam, *gam;  // (r, n), (n, d) in the compute type
  DType dtype;
  int64_t T;
};
void a_up(const ASide& p, const void* z, void* V, double scale, Device& device);
void a_down(const ASide& p, const void* U, void* out, double scale, bool accumulate,
            Device& device);
void a_grad(const ASide& p, const void* U, const void* z, double scale, void* dlam, void* dgam,
            Device& device);

// b_lists.cu (B as lists), b_planes.cu (B as planes)
//              up:    y (T, D) = scale * V (T, K) B^T [+ y]
//              down:  U (T, K) = x (T, D) B
struct BSide {
  const Basis& basis;
  DType dtype;
  int64_t T;
};
void b_up_lists(const BSide& p, const void* V, void* y, double scale, bool accumulate,
                Device& device);
void b_down_lists(const BSide& p, const void* x, void* U, Device& device);
void b_up_planes(const BSide& p, const void* V, void* y, double scale, bool accumulate,
                 Device& device);
void b_down_planes(const BSide& p, const void* x, void* U, Device& device);

}  // namespace cuda
}  // namespace randlora
