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

// generation and packing (fill_planes.cu, lists.cu, dense.cu): the CPU's results, bit for bit
void fill_planes(const FillPlanes& p, Device& device);
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

// scaled_basis.cu
void scaled_basis(const ScaledBasis& p, Device& device);
void scaled_basis_backward(const ScaledBasisBackward& p, Device& device);

// add_rounded.cu
void add_rounded(const AddRounded& p, Device& device);

// delta_weight.cu chooses delta_lists.cu or delta_planes.cu by the format of B
void delta_weight(const DeltaWeight& p, Device& device);
void delta_weight_backward(const DeltaWeightBackward& p, Device& device);

// hadamard/*.cu: what surrounds the class products of Hadamard bases (core/hadamard.h)
void hadamard_gamma(const HadamardGamma& p, Device& device);
void hadamard_diagonals(const HadamardDiagonals& p, Device& device);
void hadamard_up(const HadamardUp& p, Device& device);
void hadamard_down(const HadamardDown& p, Device& device);
void hadamard_weight(const HadamardWeight& p, Device& device);

// linear.cu: compositions of the products below
void linear(const Linear& p, Device& device);
void linear_backward(const LinearBackward& p, Device& device);

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
