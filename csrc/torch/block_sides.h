// The sides of block bases as batches of matrices, their products over chunks of tokens, and the A
// side by classes of columns on the CPU.
#pragma once
#include "backend.h"

namespace randlora {

// B (rows(), D / b_chunks) in `dtype`: row e holds column row(e) of B within its chunk of D. For
// dense bases, B (D, K).
Tensor dense_b(const BlockBasis& b, DType dtype);

// One side of the adapter: its blocks, each with its rows of V or U (rows(), T) and its columns of
// x or y. The rows of a block of A are consecutive, those of a block of B are b_chunks apart, so
// the permutation between the sides costs no copy. If all blocks have equally many rows, they are
// one batch.
struct Side {
  struct Part {
    MatrixBatch blocks;
    int64_t first, next, step;  // rows of V: block i's start at first + i * next, `step` apart
    int64_t column;             // columns of x: block i's start at column + i * blocks.cols

    MatrixBatch rows_of(const void* V, int64_t T, int64_t stride, DType dtype) const {
      return {static_cast<const char*>(V) + first * stride * bytes_of(dtype),
              blocks.count,
              blocks.rows,
              T,
              next * stride,
              step * stride,
              1};
    }
    MatrixBatch columns_of(const void* x, int64_t T, int64_t features, DType dtype) const {
      return {static_cast<const char*>(x) + column * bytes_of(dtype),
              blocks.count,
              T,
              blocks.cols,
              blocks.cols,
              features,
              1};
    }
  };
  int64_t features;
  std::vector<Part> parts;
};

Side b_side(const BlockBasis& b, const Tensor& dense, DType dtype);

// The products of one call, one chunk of tokens at a time.
class Products {
 public:
  struct Limits {
    int64_t bytes;   // for V or U, unless one chunk of `tokens` needs more
    int64_t tokens;  // a chunk holds a multiple of this, or all tokens
    int64_t align;   // of the rows of V and U, in elements
  };

  Products(const BlockBasis& b, DType dtype, int64_t T, const Limits& limits, const Tensor& like)
      : rows_(b.rows()), dtype_(dtype), T_(T), like_(like) {
    const int64_t fit = limits.bytes / (b.rows() * bytes_of(dtype)) / limits.tokens;
    chunk_ = (fit < 1 ? 1 : fit) * limits.tokens;
    if (chunk_ > T) chunk_ = T;
    stride_ = (chunk_ + limits.align - 1) / limits.align * limits.align;
  }

  Tensor buffer() const { return temporary({rows_, stride_}, dtype_, like_); }
  int64_t tokens() const { return tokens_; }
  int64_t stride() const { return stride_; }

  // fn(first token) for every chunk.
  template <class F>
  void each_chunk(const F& fn) {
    for (int64_t t = 0; t < T_; t += chunk_) {
      tokens_ = T_ - t < chunk_ ? T_ - t : chunk_;
      fn(t);
    }
  }

  // V = blocks x^T
  void down(const Side& s, const Tensor& x, int64_t t, const Tensor& V) const {
    for (const Side::Part& p : s.parts)
      multiply(rows(p, V), p.blocks, columns(s, p, x, t).transposed(), 1, 0, dtype_, like_);
  }
  // y = beta * y + alpha * V^T blocks
  void up(const Side& s, const Tensor& V, const Tensor& y, int64_t t, double alpha,
          double beta) const {
    for (const Side::Part& p : s.parts)
      multiply(columns(s, p, y, t), rows(p, V).transposed(), p.blocks, alpha, beta, dtype_, like_);
  }
  // blocks = alpha * V x; from the second chunk on, added to them.
  void gradient(const Side& s, const Tensor& V, const Tensor& x, int64_t t, double alpha) const {
    for (const Side::Part& p : s.parts)
      multiply(p.blocks, rows(p, V), columns(s, p, x, t), alpha, t == 0 ? 0 : 1, dtype_, like_);
  }

 private:
  MatrixBatch rows(const Side::Part& p, const Tensor& V) const {
    return p.rows_of(V.const_data_ptr(), tokens_, stride_, dtype_);
  }
  MatrixBatch columns(const Side& s, const Side::Part& p, const Tensor& x, int64_t t) const {
    const void* at =
        static_cast<const char*>(x.const_data_ptr()) + t * s.features * bytes_of(dtype_);
    return p.columns_of(at, tokens_, s.features, dtype_);
  }

  int64_t rows_;
  DType dtype_;
  int64_t T_, chunk_, stride_, tokens_ = 0;
  const Tensor& like_;
};

// Whether class_linear applies: x on the CPU in float32 or float64, a whole D side, and A' made of
// r classes of n columns, several in each block.
bool factors_by_classes(const BlockBasis& b, const Tensor& x);

// Like block_linear and block_linear_backward, but A' costs 1 / r instead of 1 / G of the layer's
// GEMM.
void class_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate);
std::tuple<Tensor, Tensor> class_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals);

}  // namespace randlora
