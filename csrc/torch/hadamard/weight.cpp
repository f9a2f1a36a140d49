// torch.ops.randlora.hadamard_weight and its backward: W + dW on Hadamard bases, also for several
// experts at once.
//
//   dW = scale * B (lambda * A * gamma), transposed unless `expand`
#include "adapter.h"

namespace randlora {
namespace {

// `lam` and `gam` are contiguous copies in the compute type.
void fill_operands(HadamardDelta& p, const HadamardAdapter& adapter, const Tensor& lam,
                   const Tensor& gam, const OptionalTensor& weight, DType dtype) {
  p.sizes = adapter.sizes;
  p.experts = adapter.experts();
  p.lam = lam.const_data_ptr();
  p.gam = gam.const_data_ptr();
  p.a_signs = floats(adapter.a_signs);
  p.row_signs = floats(adapter.row_signs);
  p.col_signs = floats(adapter.col_signs);
  p.next_a_signs = adapter.a_signs.dim() == 2 ? adapter.sizes.d : 0;
  p.next_row_signs = adapter.row_signs.dim() == 2 ? adapter.sizes.D : 0;
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.dtype = dtype;
  p.scale = adapter.scale;
  p.reduce = !adapter.expand;
}

// W + dW, or dW without a weight.
Tensor hadamard_weight(OptionalTensor weight, Tensor lam, Tensor gam, Tensor a_signs,
                       Tensor row_signs, Tensor col_signs, bool expand, double scale) {
  const HadamardAdapter adapter(lam, gam, a_signs, row_signs, col_signs, expand, scale);
  const DType dtype = activation_dtype(weight ? *weight : lam, weight ? "weight" : "lam");
  if (weight) check_weights(*weight, "weight", adapter);
  // Unlike the others, this operator's kernel works in tiles, so rows of B always fit.
  if (!has_kernels(lam))
    return std::get<0>(call_torch<Tensor>("randlora::hadamard_weight_plain", weight, lam, gam,
                                          a_signs, row_signs, col_signs, expand, scale));
  std::vector<int64_t> shape{adapter.out(), adapter.in()};
  if (adapter.has_experts) shape.insert(shape.begin(), adapter.experts());
  const Tensor out = allocate(shape, scalar_type(dtype), lam);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  if (weight) weight = as_contiguous(*weight);
  HadamardWeight p{};
  fill_operands(p, adapter, lam_copy, gam_copy, weight, dtype);
  p.out = out.mutable_data_ptr();
  run(lam, p);
  return out;
}

std::tuple<Tensor, Tensor> hadamard_weight_backward(Tensor grad, Tensor lam, Tensor gam,
                                                    Tensor a_signs, Tensor row_signs,
                                                    Tensor col_signs, bool expand, double scale) {
  const HadamardAdapter adapter(lam, gam, a_signs, row_signs, col_signs, expand, scale);
  const DType dtype = activation_dtype(grad, "grad");
  check_weights(grad, "grad", adapter);
  if (!serves(adapter, grad))
    return call_torch<Tensor, Tensor>("randlora::hadamard_weight_backward_plain", grad, lam, gam,
                                      a_signs, row_signs, col_signs, expand, scale);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  const Tensor dlam = allocate_like(lam_copy), dgam = allocate_like(gam_copy);
  const Tensor grad_copy = as_contiguous(grad);
  HadamardWeightBackward p{};
  fill_operands(p, adapter, lam_copy, gam_copy, grad_copy, dtype);
  p.dlam = dlam.mutable_data_ptr();
  p.dgam = dgam.mutable_data_ptr();
  run(lam, p);
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

const Operators operators{
    {"hadamard_weight(Tensor? weight, " RANDLORA_HADAMARD_ADAPTER ") -> Tensor",
     RANDLORA_BOX(hadamard_weight)},
    {"hadamard_weight_backward(Tensor grad, " RANDLORA_HADAMARD_ADAPTER ") -> (Tensor, Tensor)",
     RANDLORA_BOX(hadamard_weight_backward)},
};

}  // namespace
}  // namespace randlora
