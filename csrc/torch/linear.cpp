// torch.ops.randlora.linear: y = x W^T + bias + scale * x dW^T by one of three paths.
//
//   factored  both sides of the basis applied to x; dW never exists
//   delta     dW is formed, then two GEMMs; the base output is untouched
//   merged    W + dW is formed, then one GEMM
//
// Without a weight the result is only the adapter's part, for base layers of any kind.
#include "backend.h"
#include "delta_weight.h"

namespace randlora {
namespace {

enum class Path { factored, delta, merged };

Path path_of(const std::string& path, bool has_weight) {
  if (path == "factored") return Path::factored;
  if (path == "delta") return Path::delta;
  RANDLORA_CHECK(path == "merged", "path must be 'factored', 'delta' or 'merged', got '", path,
                 "'");
  RANDLORA_CHECK(has_weight, "path 'merged' adds to the weight, but weight is None");
  return Path::merged;
}

// Kernels read and write these tensors in the dtype of x. Autocast could change that, so
// randlora_ext/ops/autocast.py disables it around this operator.
Tensor of_dtype(const Tensor& y, const Tensor& x) {
  RANDLORA_CHECK(y.scalar_type() == x.scalar_type(), "torch computed ", describe(y), " of x ",
                 describe(x), "; autocast must not be active inside this operator");
  return y;
}

Tensor product(const Tensor& a, const Tensor& b) {
  return of_dtype(torch::stable::matmul(a, b), a);
}

Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return of_dtype(torch::stable::detail::to<Tensor>(stack[0]), x);
}

// a + b. The stable ABI has no add, only a subtraction with a factor.
Tensor sum_of(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

struct Sizes {
  int64_t T, in, out;
};

// (..., features) as (T, features).
Tensor rows(const Tensor& t, const Sizes& s, int64_t features) {
  return t.dim() == 2 ? t : torch::stable::view(t, {s.T, features});
}

Sizes check(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
            const Tensor& lam, int64_t out_features) {
  activation_dtype(x, "x");
  RANDLORA_CHECK(x.dim() >= 1, "x must be (..., in_features), got ", describe(x));
  check_same_device(x, "x", lam, "lam");
  Sizes s{1, x.size(-1), out_features};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) s.T *= x.size(i);
  if (weight) {
    check_same_device(*weight, "weight", x, "x");
    RANDLORA_CHECK(weight->dim() == 2 && weight->size(0) == s.out && weight->size(1) == s.in,
                   "weight must be (out, in) = (", s.out, ", ", s.in, ") for x ", describe(x),
                   ", got ", describe(*weight));
    RANDLORA_CHECK(weight->scalar_type() == x.scalar_type(), "weight is ", describe(*weight),
                   " but x is ", describe(x), "; they must have one dtype");
  }
  if (bias) {
    RANDLORA_CHECK(weight.has_value(),
                   "bias was given without a weight; add it to the base output");
    check_same_device(*bias, "bias", x, "x");
    RANDLORA_CHECK(
        bias->dim() == 1 && bias->size(0) == s.out && bias->scalar_type() == x.scalar_type(),
        "bias must be (", s.out, ") in the dtype of x, got ", describe(*bias));
  }
  return s;
}

// A dense B is multiplied with x by GEMMs, so it must have the dtype of x.
void check_dense(const Basis& b, const std::vector<Tensor>& packed, const Tensor& x) {
  if (!b.b_dense) return;
  RANDLORA_CHECK(runs_on_cuda(x), "packed holds a dense B, which only the CUDA kernels use; x is ",
                 describe(x));
  RANDLORA_CHECK(packed.back().scalar_type() == x.scalar_type(), "packed: the dense B is ",
                 describe(packed.back()), " but x is ", describe(x), "; they must have one dtype");
}

Tensor linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
              std::vector<Tensor> packed, double scale, int64_t out_features, std::string path,
              std::optional<bool> expand) {
  const Path p = path_of(path, weight.has_value());
  const Sizes s = check(x, weight, bias, lam, out_features);
  const Basis b = basis_of(packed, lam, gam, s.in, s.out, expand);
  const bool d_is_in = expands(expand, s.in, s.out);
  check_dense(b, packed, x);
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x);

  Tensor y;
  if (p == Path::merged)
    return torch_linear(xc, form_delta(b, lam, gam, weight, scale, s.out, s.in, d_is_in, dtype),
                        bias);
  if (p == Path::delta) {
    y = torch_linear(xc, form_delta(b, lam, gam, {}, scale, s.out, s.in, d_is_in, dtype), {});
    return weight ? sum_of(torch_linear(xc, *weight, bias), y) : y;
  }
  if (weight) {
    y = as_contiguous(torch_linear(xc, *weight, bias));
  } else {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = s.out;
    y = allocate(shape, x.scalar_type(), x);
  }
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  run(x, &Kernels::linear, &CudaKernels::linear,
      {b, l.const_data_ptr(), g.const_data_ptr(), xc.const_data_ptr(), y.mutable_data_ptr(), dtype,
       s.T, scale, /*expand=*/d_is_in, /*accumulate=*/weight.has_value()});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    Tensor dy, Tensor x, OptionalTensor weight, Tensor lam, Tensor gam, std::vector<Tensor> packed,
    double scale, std::string path, bool need_x, bool need_diagonals, std::optional<bool> expand) {
  const Path p = path_of(path, weight.has_value());
  RANDLORA_CHECK(dy.dim() == x.dim() && dy.scalar_type() == x.scalar_type(), "dy is ", describe(dy),
                 ", which does not fit x ", describe(x));
  const Sizes s = check(x, weight, {}, lam, dy.size(-1));
  check_same_device(dy, "dy", x, "x");
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    RANDLORA_CHECK(dy.size(i) == x.size(i), "dy is ", describe(dy), ", which does not fit x ",
                   describe(x));
  const Basis b = basis_of(packed, lam, gam, s.in, s.out, expand);
  const bool d_is_in = expands(expand, s.in, s.out);
  check_dense(b, packed, x);
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  Tensor dx, dlam, dgam;
  if (!need_x) dx = allocate({0}, x.scalar_type(), x);
  if (!need_diagonals)
    dlam = allocate({0}, lam.scalar_type(), lam), dgam = allocate({0}, gam.scalar_type(), gam);
  if (!need_x && !need_diagonals) return {dx, dlam, dgam};

  if (p == Path::factored) {
    const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
    if (need_x) dx = weight ? as_contiguous(product(dyc, *weight)) : allocate_like(xc);
    if (need_diagonals) dlam = allocate_like(l), dgam = allocate_like(g);
    run(x, &Kernels::linear_backward, &CudaKernels::linear_backward,
        {b, l.const_data_ptr(), g.const_data_ptr(), xc.const_data_ptr(), dyc.const_data_ptr(),
         need_x ? dx.mutable_data_ptr() : nullptr, dtype, s.T, scale, /*expand=*/d_is_in,
         /*accumulate=*/weight.has_value(), need_diagonals ? dlam.mutable_data_ptr() : nullptr,
         need_diagonals ? dgam.mutable_data_ptr() : nullptr});
    return {dx, cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
  }
  if (need_x) {
    const OptionalTensor base = p == Path::merged ? weight : OptionalTensor();
    dx = product(dyc, form_delta(b, lam, gam, base, scale, s.out, s.in, d_is_in, dtype));
    if (p == Path::delta && weight) dx = sum_of(product(dyc, *weight), dx);
  }
  if (need_diagonals) {
    const Tensor dyT = torch::stable::transpose(rows(dyc, s, s.out), 0, 1);
    const Tensor G = product(dyT, rows(xc, s, s.in));
    std::tie(dlam, dgam) = contract_delta(b, G, lam, gam, scale, d_is_in);
  }
  return {dx, dlam, dgam};
}

template <class Library>
void implement(Library& m) {
  m.impl("linear", RANDLORA_BOX(linear));
  m.impl("linear_backward", RANDLORA_BOX(linear_backward));
}

}  // namespace
}  // namespace randlora

STABLE_TORCH_LIBRARY_FRAGMENT(randlora, m) {
  m.def(
      "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lam, Tensor gam, Tensor[] packed, "
      "float scale, SymInt out_features, str path, bool? expand=None) -> Tensor");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lam, Tensor gam, "
      "Tensor[] packed, float scale, str path, bool need_x, bool need_diagonals, "
      "bool? expand=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(randlora, CPU, m) { randlora::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(randlora, CUDA, m) { randlora::implement(m); }
