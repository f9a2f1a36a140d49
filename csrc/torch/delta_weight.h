// Forming and contracting dW, for the delta_weight operators and the delta and merged paths.
#pragma once
#include "common.h"

namespace randlora {

// scale * dW (out, in) in `dtype`, added to `base` (if given) before the single rounding.
Tensor form_delta(const Basis& b, const Tensor& lam, const Tensor& gam, const OptionalTensor& base,
                  double scale, int64_t out_features, int64_t in_features, bool expand, DType dtype,
                  std::optional<int64_t> rounding_seed = {});
Tensor form_delta(const BlockBasis& b, const Tensor& lam, const Tensor& gam,
                  const OptionalTensor& base, double scale, int64_t out_features,
                  int64_t in_features, bool expand, DType dtype,
                  std::optional<int64_t> rounding_seed = {});

// (dlam, dgam) from the gradient of the result, in the types of lam and gam.
std::tuple<Tensor, Tensor> contract_delta(const Basis& b, const Tensor& grad, const Tensor& lam,
                                          const Tensor& gam, double scale, bool expand);
std::tuple<Tensor, Tensor> contract_delta(const BlockBasis& b, const Tensor& grad,
                                          const Tensor& lam, const Tensor& gam, double scale,
                                          bool expand);

}  // namespace randlora
