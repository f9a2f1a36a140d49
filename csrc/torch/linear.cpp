#include "linear.h"

namespace randlora {
namespace {

// y, a result of torch's, which kernels read and write in the dtype of x. Autocast could change its
// dtype, so randlora_ext/ops/registration.py disables it around our operators.
Tensor of_dtype(const Tensor& y, const Tensor& x) {
  RANDLORA_CHECK(y.scalar_type() == x.scalar_type(), "torch computed ", describe(y), " of x ",
                 describe(x), "; autocast must not be active inside this operator");
  return as_contiguous(y);
}

}  // namespace

void check_diagonals(const Tensor& lam, const Tensor& gam) {
  activation_dtype(lam, "lam");
  activation_dtype(gam, "gam");
  check_same_device(gam, "gam", lam, "lam");
  RANDLORA_CHECK(lam.dim() == 2 && lam.numel() > 0, "lam must be (r, n), got ", describe(lam));
  const int64_t r = lam.size(0), n = lam.size(1);
  RANDLORA_CHECK(gam.dim() == 2 && gam.size(0) == n && gam.size(1) > 0 && gam.size(1) <= r * n,
                 "gam must be (n, d) with n = ", n, " and d at most K = r * n = ", r * n, ", got ",
                 describe(gam), " with lam ", describe(lam));
}

void check_weight(const Tensor& t, const char* name, int64_t out, int64_t in, const Tensor& lam) {
  RANDLORA_CHECK(t.dim() == 2 && t.size(0) == out && t.size(1) == in, name,
                 " must be (out, in) = (", out, ", ", in, "), got ", describe(t));
  check_same_device(t, name, lam, "lam");
}

int64_t check_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& lam, int64_t in, int64_t out) {
  activation_dtype(x, "x");
  RANDLORA_CHECK(x.dim() >= 1 && x.size(-1) == in,
                 "x must be (..., in_features) with in_features = ", in, ", got ", describe(x));
  check_same_device(x, "x", lam, "lam");
  if (weight) {
    check_weight(*weight, "weight", out, in, lam);
    RANDLORA_CHECK(weight->scalar_type() == x.scalar_type(), "weight is ", describe(*weight),
                   " but x is ", describe(x), "; they must have one dtype");
  }
  if (bias) {
    RANDLORA_CHECK(weight.has_value(),
                   "bias was given without a weight; add it to the base output");
    check_same_device(*bias, "bias", x, "x");
    RANDLORA_CHECK(
        bias->dim() == 1 && bias->size(0) == out && bias->scalar_type() == x.scalar_type(),
        "bias must be (", out, ") in the dtype of x, got ", describe(*bias));
  }
  int64_t T = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) T *= x.size(i);
  return T;
}

void check_output_gradient(const Tensor& dy, const Tensor& x, int64_t out) {
  bool fits = dy.dim() == x.dim() && dy.scalar_type() == x.scalar_type() && dy.size(-1) == out;
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = dy.size(i) == x.size(i);
  RANDLORA_CHECK(fits, "dy is ", describe(dy), ", which does not fit x ", describe(x), " and ", out,
                 " output features");
  check_same_device(dy, "dy", x, "x");
}

Tensor base_output(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   int64_t out) {
  if (!weight) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = out;
    return allocate(shape, x.scalar_type(), x);
  }
  const auto [y] = call_torch<Tensor>("aten::linear", x, *weight, bias);
  return of_dtype(y, x);
}

Tensor base_gradient(const Tensor& dy, const OptionalTensor& weight, const Tensor& x) {
  return weight ? of_dtype(torch::stable::matmul(dy, *weight), dy) : allocate_like(x);
}

}  // namespace randlora
