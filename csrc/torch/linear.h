// What the operators of a linear layer with an adapter share: checks, and torch's own products.
#pragma once
#include "backend.h"

namespace randlora {

// Throws unless lam is (r, n) and gam (n, d), floating and on one device.
void check_diagonals(const Tensor& lam, const Tensor& gam);
// Throws unless the tensors are those of a layer (out, in) on the device of `lam`. Returns T.
int64_t check_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& lam, int64_t in, int64_t out);
// Throws unless `t` is (out, in) and on the device of `lam`.
void check_weight(const Tensor& t, const char* name, int64_t out, int64_t in, const Tensor& lam);
// Throws unless dy is like x with `out` features.
void check_output_gradient(const Tensor& dy, const Tensor& x, int64_t out);

// What the adapter is added to: x W^T + bias, or dy W. Without a weight, uninitialised.
Tensor base_output(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   int64_t out);
Tensor base_gradient(const Tensor& dy, const OptionalTensor& weight, const Tensor& x);

// dx, dlam and dgam; those that are not needed are absent.
using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;

}  // namespace randlora
