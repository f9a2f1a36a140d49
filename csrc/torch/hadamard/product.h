// The product of tokens with dW on Hadamard bases, up or down, and the gradients of lambda and
// gamma: class products by torch's GEMM, and our kernels around them, chunk by chunk.
#pragma once
#include "class_products.h"

namespace randlora {

// One call. `like` has the dtype and the device of all operands.
class HadamardProduct {
 public:
  HadamardProduct(const HadamardAdapter& adapter, const Tensor& like, int64_t T);

  // to (+)= the product of `from` with dW: `up` from d features to D, or down. With `other`, which
  // has the features of `to`, `finish_gradients` may follow. IndependentLinear has the same
  // operands (core/operators.h).
  void compute(bool up, const Tensor& from, const OptionalTensor& to, bool accumulate,
               const Tensor* other = nullptr);
  // dlam and dgam. Call it once.
  std::tuple<Tensor, Tensor> finish_gradients();

 private:
  void mix_up(const Temporary& z, const Tensor& y, const Chunk& chunk, bool accumulate) const;
  void mix_down(const Tensor& y, const Chunk& chunk, const Temporary& w, const Temporary* z) const;

  const HadamardAdapter& adapter_;
  const HadamardSizes& sizes_;
  const Tensor& like_;
  DType dtype_;
  Chunks chunks_;
  ClassProducts classes_;
  Temporary factors_;  // lambda times the signs of B's columns
  Temporary sums_;     // (chunks, slots, K): for the gradient of lambda
};

}  // namespace randlora
