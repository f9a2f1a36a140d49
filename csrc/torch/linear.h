// What the operators of a linear layer with an adapter share: checks, and torch's own products.
#pragma once
#include "backend.h"

namespace randlora {

struct LinearSizes {
  int64_t T, in, out;
};

// Throws unless the tensors are those of a layer (out, in) on the device of `lam`.
LinearSizes check_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& lam, int64_t in, int64_t out);
// Throws unless dy is like x with `out` features.
void check_output_gradient(const Tensor& dy, const Tensor& x, int64_t out);

// a @ b and F.linear; throw if the result has another dtype than the first argument.
Tensor product(const Tensor& a, const Tensor& b);
Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// Uninitialised, shaped like x with `features` in the last dimension.
Tensor like_output(const Tensor& x, int64_t features);

}  // namespace randlora
