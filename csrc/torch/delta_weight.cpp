// torch.ops.randlora.delta_weight (scale * B @ A', oriented as a Linear's weight), its backward,
// merged_weight, and add_rounded for a dW that already exists.
#include "delta_weight.h"

#include "backend.h"

namespace randlora {

void form_delta(const Basis& b, const Tensor& lam, const Tensor& gam, const OptionalTensor& base,
                double scale, bool expand, std::optional<int64_t> rounding_seed, Tensor& out) {
  if (lam.is_cpu()) check_ascending(b);
  const DType dtype = activation_dtype(out, "out");
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  const Tensor w = base ? as_contiguous(*base) : out;  // without a base nobody reads it
  run(lam, &Kernels::delta_weight, &CudaKernels::delta_weight,
      {b, l.const_data_ptr(), g.const_data_ptr(), base ? w.const_data_ptr() : nullptr,
       out.mutable_data_ptr(), dtype, scale, /*transposed=*/!expand, rounding_seed.has_value(),
       static_cast<uint64_t>(rounding_seed.value_or(0))});
}

std::tuple<Tensor, Tensor> contract_delta(const Basis& b, const Tensor& grad, const Tensor& lam,
                                          const Tensor& gam, double scale, bool expand) {
  if (lam.is_cpu()) check_ascending(b);
  const DType dtype = activation_dtype(grad, "grad");
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  const Tensor G = as_contiguous(grad);
  Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(lam, &Kernels::delta_weight_backward, &CudaKernels::delta_weight_backward,
      {b, l.const_data_ptr(), g.const_data_ptr(), G.const_data_ptr(), dtype, scale,
       /*transposed=*/!expand, dlam.mutable_data_ptr(), dgam.mutable_data_ptr()});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

namespace {

Tensor delta_weight(Tensor lam, Tensor gam, std::vector<Tensor> packed, double scale,
                    int64_t out_features, int64_t in_features, std::optional<bool> expand) {
  const Basis basis = basis_of(packed, lam, gam, in_features, out_features, expand);
  const ScalarType type = scalar_type(activation_dtype(lam, "lam"));
  Tensor out = allocate({out_features, in_features}, type, lam);
  form_delta(basis, lam, gam, {}, scale, expands(expand, in_features, out_features), {}, out);
  return out;
}

Tensor merged_weight(Tensor weight, Tensor lam, Tensor gam, std::vector<Tensor> packed,
                     double scale, std::optional<int64_t> rounding_seed,
                     std::optional<bool> expand) {
  RANDLORA_CHECK(weight.dim() == 2, "weight must be (out, in), got ", describe(weight));
  check_same_device(weight, "weight", lam, "lam");
  const DType dtype = activation_dtype(weight, "weight");
  RANDLORA_CHECK(!rounding_seed || bytes_of(dtype) == 2,
                 "rounding_seed rounds to bfloat16 or float16, but weight is ", describe(weight));
  const int64_t out = weight.size(0), in = weight.size(1);
  const Basis basis = basis_of(packed, lam, gam, in, out, expand);
  Tensor merged = allocate({out, in}, scalar_type(dtype), weight);
  form_delta(basis, lam, gam, weight, scale, expands(expand, in, out), rounding_seed, merged);
  return merged;
}

std::tuple<Tensor, Tensor> delta_weight_backward(Tensor grad, Tensor lam, Tensor gam,
                                                 std::vector<Tensor> packed, double scale,
                                                 std::optional<bool> expand) {
  RANDLORA_CHECK(grad.dim() == 2, "grad must be (out, in), got ", describe(grad));
  check_same_device(grad, "grad", lam, "lam");
  const int64_t out = grad.size(0), in = grad.size(1);
  const Basis basis = basis_of(packed, lam, gam, in, out, expand);
  return contract_delta(basis, grad, lam, gam, scale, expands(expand, in, out));
}

Tensor add_rounded(Tensor weight, Tensor delta, std::optional<int64_t> rounding_seed) {
  const DType dtype = activation_dtype(weight, "weight");
  RANDLORA_CHECK(bytes_of(dtype) == 2, "weight must be bfloat16 or float16, got ",
                 describe(weight));
  RANDLORA_CHECK(delta.scalar_type() == ScalarType::Float && delta.numel() == weight.numel(),
                 "delta must be float32 and have ", weight.numel(), " elements, got ",
                 describe(delta));
  check_same_device(delta, "delta", weight, "weight");
  const Tensor w = as_contiguous(weight), d = as_contiguous(delta);
  Tensor out = allocate_like(w);
  run(w, &Kernels::add_rounded, &CudaKernels::add_rounded,
      {w.numel(), w.const_data_ptr(), static_cast<const float*>(d.const_data_ptr()),
       out.mutable_data_ptr(), dtype, rounding_seed.has_value(),
       static_cast<uint64_t>(rounding_seed.value_or(0))});
  return out;
}

void implement(OperatorLibrary& m) {
  m.impl("add_rounded", RANDLORA_BOX(add_rounded));
  m.impl("delta_weight", RANDLORA_BOX(delta_weight));
  m.impl("merged_weight", RANDLORA_BOX(merged_weight));
  m.impl("delta_weight_backward", RANDLORA_BOX(delta_weight_backward));
}

}  // namespace
}  // namespace randlora

STABLE_TORCH_LIBRARY_FRAGMENT(randlora, m) {
  m.def("add_rounded(Tensor weight, Tensor delta, int? rounding_seed) -> Tensor");
  m.def(
      "delta_weight(Tensor lam, Tensor gam, Tensor[] packed, float scale, SymInt out_features, "
      "SymInt in_features, bool? expand=None) -> Tensor");
  m.def(
      "merged_weight(Tensor weight, Tensor lam, Tensor gam, Tensor[] packed, float scale, "
      "int? rounding_seed, bool? expand=None) -> Tensor");
  m.def(
      "delta_weight_backward(Tensor grad, Tensor lam, Tensor gam, Tensor[] packed, float scale, "
      "bool? expand=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(randlora, CPU, m) { randlora::implement(m); }
static const randlora::OnCuda on_cuda(&randlora::implement);
