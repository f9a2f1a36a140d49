// torch.ops.randlora.hadamard_linear and its backward: a linear layer with an adapter on Hadamard
// bases.
//
//   y = x W^T + bias + x dW^T,   dW = scale * B (lambda * A * gamma), transposed unless `expand`
//
// On the CPU the base layer's product comes first, and the adapter adds to it. On a card the base
// layer's product comes last and adds to the adapter's: a large product hides the reading of what
// it adds to, for which the adapter's last kernel would wait. With a bias, which torch adds only in
// a product that comes first, that is the order there, too.
#include "product.h"

namespace randlora {
namespace {

bool base_comes_last(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return weight && !bias && runs_on_cuda(x);
}

MatrixBatch matrix(const Tensor& weight) {
  MatrixBatch m;
  m.memory = &weight;
  m.dtype = activation_dtype(weight, "weight");
  m.rows = weight.size(0);
  m.cols = weight.size(1);
  m.row_stride = weight.stride(0);
  m.col_stride = weight.stride(1);
  return m;
}

// to += from @ right. `to` and `from` are contiguous and have T tokens.
void add_product(const Tensor& to, const Tensor& from, const MatrixBatch& right, int64_t T) {
  const auto tokens = [&](const Tensor& t) {
    return contiguous_matrix(t, right.dtype, 0, T, t.size(-1));
  };
  multiply(tokens(to), tokens(from), right, 1, 1);
}

// Only operators on weights take experts.
void check_one_layer(const Tensor& lam) {
  RANDLORA_CHECK(lam.dim() == 2, "lam must be (r, n), got ", describe(lam));
}

Tensor hadamard_linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
                       Tensor a_signs, Tensor row_signs, Tensor col_signs, bool expand,
                       double scale) {
  check_one_layer(lam);
  const HadamardAdapter adapter(lam, gam, a_signs, row_signs, col_signs, expand, scale);
  const int64_t T = check_linear(x, weight, bias, lam, adapter.in(), adapter.out());
  if (!serves(adapter, x))
    return std::get<0>(call_torch<Tensor>("randlora::hadamard_linear_plain", x, weight, bias, lam,
                                          gam, a_signs, row_signs, col_signs, expand, scale));
  const bool base_last = base_comes_last(x, weight, bias);
  const OptionalTensor weight_first = base_last ? OptionalTensor() : weight;
  const Tensor xc = as_contiguous(x), y = base_output(xc, weight_first, bias, adapter.out());
  HadamardProduct(adapter, xc, T).compute(expand, xc, y, weight_first.has_value());
  if (base_last) add_product(y, xc, matrix(*weight).transposed(), T);
  return y;
}

Gradients hadamard_linear_backward(Tensor dy, Tensor x, OptionalTensor weight, Tensor lam,
                                   Tensor gam, Tensor a_signs, Tensor row_signs, Tensor col_signs,
                                   bool expand, double scale, bool need_dx, bool need_dlam_dgam) {
  check_one_layer(lam);
  const HadamardAdapter adapter(lam, gam, a_signs, row_signs, col_signs, expand, scale);
  const int64_t T = check_linear(x, weight, {}, lam, adapter.in(), adapter.out());
  check_output_gradient(dy, x, adapter.out());
  if (!need_dx && !need_dlam_dgam) return {};
  if (!serves(adapter, x))
    return call_torch<OptionalTensor, OptionalTensor, OptionalTensor>(
        "randlora::hadamard_linear_backward_plain", dy, x, weight, lam, gam, a_signs, row_signs,
        col_signs, expand, scale, need_dx, need_dlam_dgam);
  const Tensor dyc = as_contiguous(dy);
  const Tensor xc = need_dlam_dgam ? as_contiguous(x) : x;
  const bool base_last = need_dx && base_comes_last(x, weight, {});
  const OptionalTensor weight_first = base_last ? OptionalTensor() : weight;
  OptionalTensor dx, dlam, dgam;
  if (need_dx) dx = base_gradient(dyc, weight_first, xc);
  HadamardProduct product(adapter, xc, T);
  product.compute(!expand, dyc, dx, weight_first.has_value(), need_dlam_dgam ? &xc : nullptr);
  if (base_last) add_product(*dx, dyc, matrix(*weight), T);
  if (need_dlam_dgam) std::tie(dlam, dgam) = product.finish_gradients();
  return {dx, dlam, dgam};
}

const Operators operators{
    {"hadamard_linear(Tensor x, Tensor? weight, Tensor? bias, " RANDLORA_HADAMARD_ADAPTER
     ") -> Tensor",
     RANDLORA_BOX(hadamard_linear)},
    {"hadamard_linear_backward(Tensor dy, Tensor x, Tensor? weight, " RANDLORA_HADAMARD_ADAPTER
     ", bool need_dx, bool need_dlam_dgam) -> (Tensor?, Tensor?, Tensor?)",
     RANDLORA_BOX(hadamard_linear_backward)},
};

}  // namespace
}  // namespace randlora
