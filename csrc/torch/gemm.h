// Products of matrices by torch's GEMM.
#pragma once
#include <utility>

#include "common.h"

namespace randlora {

// `count` matrices (rows, cols) in the memory of one tensor, from its element `first` on. Strides
// are in elements.
struct MatrixBatch {
  const Tensor* memory = nullptr;  // of `dtype`, or on the CPU of any
  DType dtype = DType::f32;
  int64_t first = 0;
  int64_t count = 1, rows = 0, cols = 0;
  int64_t matrix_stride = 0, row_stride = 0, col_stride = 1;

  MatrixBatch transposed() const {
    MatrixBatch m = *this;
    std::swap(m.rows, m.cols);
    std::swap(m.row_stride, m.col_stride);
    return m;
  }
  MatrixBatch matrices(int64_t begin, int64_t number) const {
    MatrixBatch m = *this;
    m.first += begin * matrix_stride;
    m.count = number;
    return m;
  }
  MatrixBatch part_of_rows(int64_t begin, int64_t end) const {
    MatrixBatch m = *this;
    m.first += begin * row_stride;
    m.rows = end - begin;
    return m;
  }
  MatrixBatch part_of_cols(int64_t begin, int64_t end) const {
    MatrixBatch m = *this;
    m.first += begin * col_stride;
    m.cols = end - begin;
    return m;
  }
  // The matrices as a tensor; as a matrix, if there is one.
  Tensor tensor() const;
};

// One matrix (rows, cols) whose rows follow each other, from element `first` on.
MatrixBatch contiguous_matrix(const Tensor& memory, DType dtype, int64_t first, int64_t rows,
                              int64_t cols);

// out = keep * out + factor * left @ right by torch's GEMM, in one dtype on one device. With
// keep = 0, out is not read. On the CPU the result does not depend on the number of threads.
void multiply(const MatrixBatch& out, const MatrixBatch& left, const MatrixBatch& right,
              double factor, double keep);
// How many GEMMs `multiply` has started on cards, which tests/gpu counts.
int64_t products();

}  // namespace randlora
