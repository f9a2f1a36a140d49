// torch.ops.randlora.delta_weight: scale * B @ A', oriented as a Linear's weight (out, in).
#include "delta_weight.h"

#include "backend.h"

namespace randlora {

Tensor form_delta(const Basis& b, const Tensor& lam, const Tensor& gam, const OptionalTensor& base,
                  double scale, int64_t out_features, int64_t in_features, DType dtype,
                  std::optional<int64_t> rounding_seed) {
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  Tensor out = allocate({out_features, in_features}, scalar_type(dtype), lam);
  const Tensor w = base ? as_contiguous(*base) : out;  // `out` only keeps w from being empty
  run(lam, &Kernels::delta_weight, &CudaKernels::delta_weight,
      {b, l.const_data_ptr(), g.const_data_ptr(), base ? w.const_data_ptr() : nullptr,
       out.mutable_data_ptr(), dtype, scale, /*transposed=*/b.d != in_features,
       rounding_seed.has_value(), static_cast<uint64_t>(rounding_seed.value_or(0))});
  return out;
}

std::tuple<Tensor, Tensor> contract_delta(const Basis& b, const Tensor& grad, const Tensor& lam,
                                          const Tensor& gam, double scale) {
  const DType dtype = activation_dtype(grad, "grad");
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  const Tensor G = as_contiguous(grad);
  Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(lam, &Kernels::delta_weight_backward, &CudaKernels::delta_weight_backward,
      {b, l.const_data_ptr(), g.const_data_ptr(), G.const_data_ptr(), dtype, scale,
       /*transposed=*/b.d != G.size(1), dlam.mutable_data_ptr(), dgam.mutable_data_ptr()});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

namespace {

Tensor delta_weight(Tensor lam, Tensor gam, std::vector<Tensor> packed, double scale,
                    int64_t out_features, int64_t in_features) {
  const Basis b = basis_of(packed, lam, gam, in_features, out_features);
  return form_delta(b, lam, gam, {}, scale, out_features, in_features,
                    activation_dtype(lam, "lam"));
}

Tensor merged_weight(Tensor weight, Tensor lam, Tensor gam, std::vector<Tensor> packed,
                     double scale, std::optional<int64_t> rounding_seed) {
  RANDLORA_CHECK(weight.dim() == 2, "weight must be (out, in), got ", describe(weight));
  check_same_device(weight, "weight", lam, "lam");
  const DType dtype = activation_dtype(weight, "weight");
  RANDLORA_CHECK(!rounding_seed || bytes_of(dtype) == 2,
                 "rounding_seed rounds to bfloat16 or float16, but weight is ", describe(weight));
  const Basis b = basis_of(packed, lam, gam, weight.size(1), weight.size(0));
  return form_delta(b, lam, gam, weight, scale, weight.size(0), weight.size(1), dtype,
                    rounding_seed);
}

std::tuple<Tensor, Tensor> delta_weight_backward(Tensor grad, Tensor lam, Tensor gam,
                                                 std::vector<Tensor> packed, double scale) {
  RANDLORA_CHECK(grad.dim() == 2, "grad must be (out, in), got ", describe(grad));
  check_same_device(grad, "grad", lam, "lam");
  const Basis b = basis_of(packed, lam, gam, grad.size(1), grad.size(0));
  return contract_delta(b, grad, lam, gam, scale);
}

template <class Library>
void implement(Library& m) {
  m.impl("delta_weight", TORCH_BOX(&delta_weight));
  m.impl("merged_weight", TORCH_BOX(&merged_weight));
  m.impl("delta_weight_backward", TORCH_BOX(&delta_weight_backward));
}

}  // namespace
}  // namespace randlora

STABLE_TORCH_LIBRARY_FRAGMENT(randlora, m) {
  m.def(
      "delta_weight(Tensor lam, Tensor gam, Tensor[] packed, float scale, SymInt out_features, "
      "SymInt in_features) -> Tensor");
  m.def(
      "merged_weight(Tensor weight, Tensor lam, Tensor gam, Tensor[] packed, float scale, "
      "int? rounding_seed) -> Tensor");
  m.def(
      "delta_weight_backward(Tensor grad, Tensor lam, Tensor gam, Tensor[] packed, float scale) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(randlora, CPU, m) { randlora::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(randlora, CUDA, m) { randlora::implement(m); }
