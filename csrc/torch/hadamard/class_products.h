// The class products of Hadamard bases (core/hadamard.h) by torch's GEMM: one small matrix product
// for each class of neighbouring columns.
#pragma once
#include "../gemm.h"
#include "adapter.h"
#include "chunks.h"

namespace randlora {

class ClassProducts {
 public:
  // `like` has the dtype and the device of all x and y.
  ClassProducts(const HadamardAdapter& adapter, const Chunks& chunks, const Tensor& like);

  // Where HadamardSignedDiagonals writes: gamma times the signs of A.
  void* signed_gamma() const { return gamma_.data(); }
  // z and w: (classes, tokens of a chunk, n), with room for a vector behind it.
  Temporary make_z_or_w() const;

  // z = the class products with the chunk's tokens of x (T, d). A call has one such x.
  void into_classes(const Tensor& x, const Chunk& chunk, const Temporary& z);
  // Adds the class products with w to the chunk's tokens of y (T, d), or sets them unless
  // `accumulate`. `room` is scratch like w.
  void from_classes(const Temporary& w, const Tensor& y, const Chunk& chunk, bool accumulate,
                    const Temporary& room) const;

  // The gradient of gamma, without scale and signs, from w and x of all chunks in turn.
  void reserve_gradient();
  void add_gradient(const Temporary& w, const Tensor& x, const Chunk& chunk);
  // (classes, n, n). Adds up the spans: call it once, after all chunks.
  const void* finish_gradient();

 private:
  // Neighbouring classes with equally many columns: the whole ones, or the last that d does not
  // fill.
  struct ClassRange {
    int64_t first, count, width;  // width: columns of each
  };
  template <class F>
  void each_width(const F& fn) const;

  MatrixBatch of_classes(const Temporary& z, const ClassRange& c, const Chunk& chunk) const;
  MatrixBatch gamma_of(const ClassRange& c) const;
  MatrixBatch gradient_of(const ClassRange& c, int64_t span) const;
  MatrixBatch tokens_of(const Tensor& x, DType dtype, const Chunk& chunk) const;
  MatrixBatch columns_of(const MatrixBatch& all, const ClassRange& c) const;
  MatrixBatch in_class_dtype(const Tensor& x, const Chunk& chunk);
  template <class C>
  void sum_spans();

  const HadamardAdapter& adapter_;
  const HadamardSizes& sizes_;
  const Chunks& chunks_;
  const Tensor& like_;
  DType dtype_, class_dtype_;
  Temporary gamma_;      // (n, d)
  Temporary gradient_;   // (spans, classes, n, n)
  Temporary copy_;       // a chunk of x in the class dtype
  int64_t copied_ = -1;  // the chunk that copy_ holds
};

}  // namespace randlora
