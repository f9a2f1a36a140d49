// What the operators of a linear layer with an adapter share: checks, and torch's own products.
#pragma once
#include "backend.h"

namespace randlora {

// Throws unless the tensors are those of a layer (out, in) on the device of `lam`. Returns T.
int64_t check_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& lam, int64_t in, int64_t out);
// Throws unless `t` is (out, in) and on the device of `lam`.
void check_weight(const Tensor& t, const char* name, int64_t out, int64_t in, const Tensor& lam);
// Throws unless dy is like x with `out` features.
void check_output_gradient(const Tensor& dy, const Tensor& x, int64_t out);

// a @ b and F.linear; throw if the result has another dtype than the first argument.
Tensor product(const Tensor& a, const Tensor& b);
Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// Uninitialised, shaped like x with `features` in the last dimension.
Tensor like_output(const Tensor& x, int64_t features);

// What decides dW (out, in).
struct Adapter {
  Basis basis;
  const Tensor &lam, &gam;
  double scale;
  bool expand;  // d is the input side

  int64_t in() const { return expand ? basis.d : basis.D; }
  int64_t out() const { return expand ? basis.D : basis.d; }
};
// delta_weight.cpp: out (out, in) = dW, added to `base` (if given) before the single rounding to
// the dtype of `out`.
void form_delta(const Adapter& a, const OptionalTensor& base, std::optional<int64_t> rounding_seed,
                Tensor& out);
// (dlam, dgam) from the gradient of the result, in the types of lam and gam.
std::tuple<Tensor, Tensor> contract_delta(const Adapter& a, const Tensor& grad);

}  // namespace randlora
