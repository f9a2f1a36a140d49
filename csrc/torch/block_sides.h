// The sides of block bases as batches of matrices, and the A side by classes of columns on the CPU.
#pragma once
#include "backend.h"

namespace randlora {

// B (K, D / G) in `dtype`: row c holds column c of B within chunk c % G. Of dense bases (D, K).
Tensor dense_b(const BlockBasis& b, DType dtype);

// One side of the adapter: G blocks (K / G, features / G), and where the rows of a block lie in V
// or U (K, T). A's rows follow each other, and B's are G apart: the permutation between the two
// sides costs no copy.
struct Side {
  MatrixBatch blocks;
  int64_t features, row;  // of V or U, in rows

  MatrixBatch rows_of(const void* V, int64_t T, int64_t stride) const {
    const int64_t next = row == 1 ? blocks.rows : 1;
    return {V, blocks.count, blocks.rows, T, next * stride, row * stride, 1};
  }
  MatrixBatch chunks_of(const void* x, int64_t T) const {
    return {x, blocks.count, T, blocks.cols, blocks.cols, features, 1};
  }
};

inline Side b_side(const BlockBasis& b, const Tensor& dense) {
  const int64_t rows = b.K() / b.G, width = b.b_width();
  if (b.is_dense())
    return {{dense.const_data_ptr(), 1, rows, width, 0, dense.stride(1), dense.stride(0)}, b.D, 1};
  return {{dense.const_data_ptr(), b.G, rows, width, width, b.G * width, 1}, b.D, b.G};
}

// Whether x is on the CPU and A' is made of r classes of n columns, of which a block has several.
bool factors_by_classes(const BlockBasis& b, const Tensor& x);

// As block_linear and block_linear_backward; A' costs 1 / r instead of 1 / G of the layer's GEMM.
void class_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate);
std::tuple<Tensor, Tensor> class_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals);

}  // namespace randlora
