#include "product.h"

namespace randlora {

HadamardProduct::HadamardProduct(const HadamardAdapter& adapter, const Tensor& like, int64_t T)
    : adapter_(adapter),
      sizes_(adapter.sizes),
      like_(like),
      dtype_(activation_dtype(like, "x")),
      chunks_(sizes_, T, dtype_, like),
      classes_(adapter, chunks_, like),
      factors_(sizes_.room_of_factors(), compute_dtype(dtype_), like) {
  const Tensor lam = compute_copy(adapter.lam, dtype_), gam = compute_copy(adapter.gam, dtype_);
  HadamardSignedDiagonals p{};
  p.sizes = sizes_;
  p.gam = gam.const_data_ptr();
  p.a_signs = floats(adapter.a_signs);
  p.signed_gam = classes_.signed_gamma();
  p.lam = lam.const_data_ptr();
  p.col_signs = floats(adapter.col_signs);
  p.factors = factors_.data();
  p.dtype = dtype_;
  run(like, p);
}

// The operand with d features meets the class products, the one with D features the kernels. For
// the gradients both are needed, whichever is `from`.
void HadamardProduct::compute(bool up, const Tensor& from, const OptionalTensor& to,
                              bool accumulate, const Tensor* other) {
  const Tensor* small = up ? &from : other;  // (T, d)
  const Tensor* large = up ? other : &from;  // (T, D)
  const bool gradients = other != nullptr;
  if (gradients) {
    classes_.reserve_gradient();
    sums_ = Temporary(chunks_.count * chunks_.slots * sizes_.K(), compute_dtype(dtype_), like_);
  }
  const Temporary z = classes_.make_z_or_w();
  const Temporary w = up && !gradients ? Temporary() : classes_.make_z_or_w();
  for (int64_t number = 0; number < chunks_.count; ++number) {
    const Chunk chunk = chunks_.at(number);
    if (small) classes_.into_classes(*small, chunk, z);
    if (up && to) mix_up(z, *to, chunk, accumulate);
    if (large) mix_down(*large, chunk, w, gradients ? &z : nullptr);
    // z has been read, and is scratch here.
    if (!up && to) classes_.from_classes(w, *to, chunk, accumulate, z);
    if (gradients) classes_.add_gradient(w, *small, chunk);
  }
}

std::tuple<Tensor, Tensor> HadamardProduct::finish_gradients() {
  const ScalarType type = scalar_type(compute_dtype(dtype_));
  Tensor dlam = allocate({sizes_.r, sizes_.n}, type, like_);
  Tensor dgam = allocate({sizes_.n, sizes_.d}, type, like_);
  HadamardDiagonalGradients p{};
  p.sizes = sizes_;
  p.class_gradient = classes_.finish_gradient();
  p.sums = sums_.data();
  p.slots = chunks_.count * chunks_.slots;
  p.a_signs = floats(adapter_.a_signs);
  p.col_signs = floats(adapter_.col_signs);
  p.dlam = dlam.mutable_data_ptr();
  p.dgam = dgam.mutable_data_ptr();
  p.dtype = dtype_;
  p.scale = adapter_.scale;
  run(like_, p);
  return {cast(dlam, adapter_.lam.scalar_type()), cast(dgam, adapter_.gam.scalar_type())};
}

// Adds to the chunk's tokens of y (T, D) what z gives by mix and transform, or sets them unless
// `accumulate`.
void HadamardProduct::mix_up(const Temporary& z, const Tensor& y, const Chunk& chunk,
                             bool accumulate) const {
  HadamardUp p{};
  p.sizes = sizes_;
  p.z = z.data();
  p.factors = factors_.data();
  p.row_signs = floats(adapter_.row_signs);
  p.y = moved(y.mutable_data_ptr(), chunk.first * sizes_.D, dtype_);
  p.dtype = dtype_;
  p.T = chunk.tokens;
  p.scale = adapter_.scale;
  p.accumulate = accumulate;
  run(like_, p);
}

// w from the chunk's tokens of y (T, D); with z, also the sums for the gradient of lambda.
void HadamardProduct::mix_down(const Tensor& y, const Chunk& chunk, const Temporary& w,
                               const Temporary* z) const {
  HadamardDown p{};
  p.sizes = sizes_;
  p.y = moved(y.const_data_ptr(), chunk.first * sizes_.D, dtype_);
  p.factors = factors_.data();
  p.row_signs = floats(adapter_.row_signs);
  p.w = w.data();
  if (z) {
    p.z = z->data();
    p.sums = moved(sums_.data(), chunk.number * chunks_.slots * sizes_.K(), compute_dtype(dtype_));
  }
  p.slots = chunks_.slots;
  p.dtype = dtype_;
  p.T = chunk.tokens;
  run(like_, p);
}

}  // namespace randlora
