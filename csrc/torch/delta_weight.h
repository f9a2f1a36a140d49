// Forming and contracting dW, for the delta_weight operators and the delta and merged paths.
#pragma once
#include "common.h"

namespace randlora {

// out (out_features, in_features) = dW, added to `base` (if given) before the single rounding to
// the dtype of `out`.
void form_delta(const Basis& b, const Tensor& lam, const Tensor& gam, const OptionalTensor& base,
                double scale, bool expand, std::optional<int64_t> rounding_seed, Tensor& out);

// (dlam, dgam) from the gradient of the result, in the types of lam and gam.
std::tuple<Tensor, Tensor> contract_delta(const Basis& b, const Tensor& grad, const Tensor& lam,
                                          const Tensor& gam, double scale, bool expand);

}  // namespace randlora
