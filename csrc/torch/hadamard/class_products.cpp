#include "class_products.h"

#include <algorithm>

namespace randlora {
namespace {

constexpr int64_t kVector = 64;  // more numbers than a vector of any instruction set has

void copy(const MatrixBatch& to, const MatrixBatch& from) {
  Tensor result = to.tensor();
  torch::stable::copy_(result, from.tensor());
}

}  // namespace

ClassProducts::ClassProducts(const HadamardAdapter& adapter, const Chunks& chunks,
                             const Tensor& like)
    : adapter_(adapter),
      sizes_(adapter.sizes),
      chunks_(chunks),
      like_(like),
      dtype_(activation_dtype(like, "x")),
      class_dtype_(class_dtype(dtype_)),
      gamma_(sizes_.n * sizes_.d, class_dtype_, like) {
  if (dtype_ != class_dtype_) copy_ = Temporary(chunks.largest * sizes_.d, class_dtype_, like);
}

Temporary ClassProducts::make_z_or_w() const {
  return Temporary(sizes_.classes() * chunks_.largest * sizes_.n + kVector, class_dtype_, like_);
}

void ClassProducts::into_classes(const Tensor& x, const Chunk& chunk, const Temporary& z) {
  const MatrixBatch from = in_class_dtype(x, chunk);
  each_width([&](const ClassRange& c) {
    multiply(of_classes(z, c, chunk), columns_of(from, c), gamma_of(c).transposed(), 1, 0);
  });
}

void ClassProducts::from_classes(const Temporary& w, const Tensor& y, const Chunk& chunk,
                                 bool accumulate, const Temporary& room) const {
  if (chunks_.in_caches) {
    each_width([&](const ClassRange& c) {
      MatrixBatch out = of_classes(room, c, chunk);
      out.cols = c.width;
      multiply(out, of_classes(w, c, chunk), gamma_of(c), 1, 0);
    });
    HadamardAdd p{};
    p.sizes = sizes_;
    p.from = room.data();
    p.y = moved(y.mutable_data_ptr(), chunk.first * sizes_.d, dtype_);
    p.dtype = dtype_;
    p.T = chunk.tokens;
    p.scale = adapter_.scale;
    p.accumulate = accumulate;
    TorchRuntime runtime;
    cpu_kernels().hadamard_add(p, runtime);
    return;
  }
  const MatrixBatch to = tokens_of(y, dtype_, chunk);
  // torch's GEMM adds to results of its own dtype alone.
  const bool direct = dtype_ == class_dtype_;
  MatrixBatch sums = to;
  if (!direct) {
    sums = contiguous_matrix(room.tensor(), class_dtype_, 0, chunk.tokens, sizes_.d);
    if (accumulate) copy(sums, to);
  }
  each_width([&](const ClassRange& c) {
    multiply(columns_of(sums, c), of_classes(w, c, chunk), gamma_of(c), adapter_.scale, accumulate);
  });
  if (!direct) copy(to, sums);
}

void ClassProducts::reserve_gradient() {
  const int64_t numbers = chunks_.spans * sizes_.classes() * sizes_.n * sizes_.n;
  gradient_ = Temporary(numbers, class_dtype_, like_);
  if (chunks_.count > 0) return;
  Tensor all = contiguous_matrix(gradient_.tensor(), class_dtype_, 0, 1, numbers).tensor();
  torch::stable::zero_(all);
}

void ClassProducts::add_gradient(const Temporary& w, const Tensor& x, const Chunk& chunk) {
  const MatrixBatch from = in_class_dtype(x, chunk);
  each_width([&](const ClassRange& c) {
    multiply(gradient_of(c, chunk.span), of_classes(w, c, chunk).transposed(), columns_of(from, c),
             1, !chunk.begins_span);
  });
}

const void* ClassProducts::finish_gradient() {
  if (chunks_.spans > 1) {  // only in 32 and 64 bits (chunks.cpp)
    if (class_dtype_ == DType::f64)
      sum_spans<double>();
    else
      sum_spans<float>();
  }
  return gradient_.data();
}

template <class F>
void ClassProducts::each_width(const F& fn) const {
  const int64_t whole = sizes_.d / sizes_.n, rest = sizes_.d % sizes_.n;
  if (whole > 0) fn(ClassRange{0, whole, sizes_.n});
  if (rest > 0) fn(ClassRange{whole, 1, rest});
}

// Of z, (tokens, n) for each class.
MatrixBatch ClassProducts::of_classes(const Temporary& z, const ClassRange& c,
                                      const Chunk& chunk) const {
  MatrixBatch m;
  m.memory = &z.tensor();
  m.dtype = class_dtype_;
  m.matrix_stride = chunk.tokens * sizes_.n;
  m.first = c.first * m.matrix_stride;
  m.count = c.count;
  m.rows = chunk.tokens;
  m.cols = sizes_.n;
  m.row_stride = sizes_.n;
  return m;
}

// (n, columns) for each class.
MatrixBatch ClassProducts::gamma_of(const ClassRange& c) const {
  const MatrixBatch all = contiguous_matrix(gamma_.tensor(), class_dtype_, 0, sizes_.n, sizes_.d);
  return columns_of(all, c);
}

// (n, columns) for each class.
MatrixBatch ClassProducts::gradient_of(const ClassRange& c, int64_t span) const {
  MatrixBatch m;
  m.memory = &gradient_.tensor();
  m.dtype = class_dtype_;
  m.matrix_stride = sizes_.n * sizes_.n;
  m.first = (span * sizes_.classes() + c.first) * m.matrix_stride;
  m.count = c.count;
  m.rows = sizes_.n;
  m.cols = c.width;
  m.row_stride = sizes_.n;
  return m;
}

// Of x (T, d), the chunk's tokens.
MatrixBatch ClassProducts::tokens_of(const Tensor& x, DType dtype, const Chunk& chunk) const {
  return contiguous_matrix(x, dtype, chunk.first * sizes_.d, chunk.tokens, sizes_.d);
}

// Of a matrix with d columns, those of each class.
MatrixBatch ClassProducts::columns_of(const MatrixBatch& all, const ClassRange& c) const {
  MatrixBatch m = all;
  m.matrix_stride = sizes_.n;
  m.first += c.first * sizes_.n;
  m.count = c.count;
  m.cols = c.width;
  return m;
}

// The chunk's tokens of x in the class dtype.
MatrixBatch ClassProducts::in_class_dtype(const Tensor& x, const Chunk& chunk) {
  const MatrixBatch from = tokens_of(x, dtype_, chunk);
  if (dtype_ == class_dtype_) return from;
  const MatrixBatch to = contiguous_matrix(copy_.tensor(), class_dtype_, 0, chunk.tokens, sizes_.d);
  if (copied_ != chunk.number) copy(to, from);
  copied_ = chunk.number;
  return to;
}

template <class C>
void ClassProducts::sum_spans() {
  const int64_t size = sizes_.classes() * sizes_.n * sizes_.n;
  C* sums = static_cast<C*>(gradient_.data());
  for (int64_t e = size; e < chunks_.spans * size; ++e) sums[e % size] += sums[e];
}

}  // namespace randlora
