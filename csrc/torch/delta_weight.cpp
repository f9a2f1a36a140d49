// torch.ops.randlora.delta_weight (scale * B @ A', oriented as a Linear's weight), its backward,
// merged_weight, and add_rounded for a dW that already exists.
#include "linear.h"

namespace randlora {

void form_delta(const Adapter& a, const OptionalTensor& base, std::optional<int64_t> rounding_seed,
                Tensor& out) {
  if (a.lam.is_cpu()) check_b_ascending(a.basis);
  const DType dtype = activation_dtype(out, "out");
  const Tensor l = compute_copy(a.lam, dtype), g = compute_copy(a.gam, dtype);
  const Tensor w = base ? as_contiguous(*base) : out;  // without a base nobody reads it
  run(a.lam, DeltaWeight{a.basis, l.const_data_ptr(), g.const_data_ptr(),
                         base ? w.const_data_ptr() : nullptr, out.mutable_data_ptr(), dtype,
                         a.scale, /*transposed=*/!a.expand, rounding_seed.has_value(),
                         static_cast<uint64_t>(rounding_seed.value_or(0))});
}

std::tuple<Tensor, Tensor> contract_delta(const Adapter& a, const Tensor& grad) {
  if (a.lam.is_cpu()) check_b_ascending(a.basis);
  const DType dtype = activation_dtype(grad, "grad");
  const Tensor l = compute_copy(a.lam, dtype), g = compute_copy(a.gam, dtype);
  const Tensor G = as_contiguous(grad);
  Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(a.lam, DeltaWeightBackward{a.basis, l.const_data_ptr(), g.const_data_ptr(),
                                 G.const_data_ptr(), dtype, a.scale, /*transposed=*/!a.expand,
                                 dlam.mutable_data_ptr(), dgam.mutable_data_ptr()});
  return {cast(dlam, a.lam.scalar_type()), cast(dgam, a.gam.scalar_type())};
}

namespace {

Tensor delta_weight(Tensor lam, Tensor gam, std::vector<Tensor> packed, std::string format,
                    int64_t D, bool expand, double scale) {
  const Adapter a{basis_of(packed, format, D, lam, gam), lam, gam, scale, expand};
  Tensor out = allocate({a.out(), a.in()}, lam.scalar_type(), lam);
  form_delta(a, {}, {}, out);
  return out;
}

Tensor merged_weight(Tensor weight, Tensor lam, Tensor gam, std::vector<Tensor> packed,
                     std::string format, int64_t D, bool expand, double scale,
                     std::optional<int64_t> rounding_seed) {
  const DType dtype = activation_dtype(weight, "weight");
  RANDLORA_CHECK(!rounding_seed || bytes_of(dtype) == 2,
                 "rounding_seed rounds to bfloat16 or float16, but weight is ", describe(weight));
  const Adapter a{basis_of(packed, format, D, lam, gam), lam, gam, scale, expand};
  check_weight(weight, "weight", a.out(), a.in(), lam);
  Tensor merged = allocate_like(weight);
  form_delta(a, weight, rounding_seed, merged);
  return merged;
}

std::tuple<Tensor, Tensor> delta_weight_backward(Tensor grad, Tensor lam, Tensor gam,
                                                 std::vector<Tensor> packed, std::string format,
                                                 int64_t D, bool expand, double scale) {
  const Adapter a{basis_of(packed, format, D, lam, gam), lam, gam, scale, expand};
  check_weight(grad, "grad", a.out(), a.in(), lam);
  return contract_delta(a, grad);
}

Tensor add_rounded(Tensor weight, Tensor delta, std::optional<int64_t> rounding_seed) {
  const DType dtype = activation_dtype(weight, "weight");
  RANDLORA_CHECK(bytes_of(dtype) == 2, "weight must be bfloat16 or float16, got ",
                 describe(weight));
  RANDLORA_CHECK(delta.scalar_type() == ScalarType::Float && delta.sizes() == weight.sizes(),
                 "delta must be float32 in the shape of weight ", describe(weight), ", got ",
                 describe(delta));
  check_same_device(delta, "delta", weight, "weight");
  const Tensor w = as_contiguous(weight), d = as_contiguous(delta);
  Tensor out = allocate_like(w);
  run(w, AddRounded{w.numel(), w.const_data_ptr(), static_cast<const float*>(d.const_data_ptr()),
                    out.mutable_data_ptr(), dtype, rounding_seed.has_value(),
                    static_cast<uint64_t>(rounding_seed.value_or(0))});
  return out;
}

const Operators operators{
    {"add_rounded(Tensor weight, Tensor delta, int? rounding_seed) -> Tensor",
     RANDLORA_BOX(add_rounded)},
    {"delta_weight(Tensor lam, Tensor gam, Tensor[] packed, str format, SymInt D, bool expand, "
     "float scale) -> Tensor",
     RANDLORA_BOX(delta_weight)},
    {"merged_weight(Tensor weight, Tensor lam, Tensor gam, Tensor[] packed, str format, SymInt D, "
     "bool expand, float scale, int? rounding_seed) -> Tensor",
     RANDLORA_BOX(merged_weight)},
    {"delta_weight_backward(Tensor grad, Tensor lam, Tensor gam, Tensor[] packed, str format, "
     "SymInt D, bool expand, float scale) -> (Tensor, Tensor)",
     RANDLORA_BOX(delta_weight_backward)},
};

}  // namespace
}  // namespace randlora
