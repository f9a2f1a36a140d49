// torch.ops.randlora.linear: y = x W^T + bias + x dW^T, dW = scale * B A', by one of three paths.
//
//   factored  both sides of the basis applied to x; dW never exists
//   delta     dW is formed, then two GEMMs; the base output is untouched
//   merged    W + dW is formed, then one GEMM; in 16 bits the sum is rounded
//
// Without a weight the result is only the adapter's part, for base layers of any kind.
#include "linear.h"

namespace randlora {
namespace {

// y, a result of torch's, which kernels read and write in the dtype of x. Autocast could change its
// dtype, so randlora_ext/ops/registration.py disables it around this operator.
Tensor of_dtype(const Tensor& y, const Tensor& x) {
  RANDLORA_CHECK(y.scalar_type() == x.scalar_type(), "torch computed ", describe(y), " of x ",
                 describe(x), "; autocast must not be active inside this operator");
  return y;
}

}  // namespace

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

Tensor like_output(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = features;
  return allocate(shape, x.scalar_type(), x);
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

// a + b. The stable ABI has no add, only a subtraction with a factor.
Tensor sum_of(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// (..., features) as (T, features).
Tensor rows(const Tensor& t, int64_t T) {
  return t.dim() == 2 ? t : torch::stable::view(t, {T, t.size(-1)});
}

// The dense unscaled B (D, K), if given: products with it are GEMMs, so it has the dtype of x.
const void* check_dense_b(const Basis& b, const OptionalTensor& b_dense, const Tensor& x) {
  if (!b_dense) return nullptr;
  RANDLORA_CHECK(runs_on_cuda(x), "b_dense is for the CUDA kernels only, but x is ", describe(x));
  check_same_device(*b_dense, "b_dense", x, "x");
  RANDLORA_CHECK(b_dense->dim() == 2 && b_dense->size(0) == b.D && b_dense->size(1) == b.K() &&
                     b_dense->is_contiguous() && b_dense->scalar_type() == x.scalar_type(),
                 "b_dense must be a contiguous (D, K) = (", b.D, ", ", b.K(),
                 ") in the dtype of x, got ", describe(*b_dense));
  return b_dense->const_data_ptr();
}

// W + dW if there is a base, otherwise dW; (out, in).
Tensor formed(const Adapter& a, DType dtype, const OptionalTensor& base) {
  Tensor out = temporary({a.out(), a.in()}, dtype, a.lam);
  form_delta(a, base, {}, out);
  return out;
}

Tensor linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
              std::vector<Tensor> packed, std::string format, int64_t D, bool expand, double scale,
              std::string path, OptionalTensor b_dense) {
  const Path p = path_of(path, weight.has_value());
  Adapter a{basis_of(packed, format, D, lam, gam), lam, gam, scale, expand};
  const int64_t T = check_linear(x, weight, bias, lam, a.in(), a.out());
  a.basis.b_dense = check_dense_b(a.basis, b_dense, x);
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x);
  if (p == Path::merged) return torch_linear(xc, formed(a, dtype, weight), bias);
  if (p == Path::delta) {
    const Tensor y = torch_linear(xc, formed(a, dtype, {}), {});
    return weight ? sum_of(torch_linear(xc, *weight, bias), y) : y;
  }
  Tensor y = weight ? as_contiguous(torch_linear(xc, *weight, bias)) : like_output(xc, a.out());
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  run(x, Linear{a.basis, l.const_data_ptr(), g.const_data_ptr(), xc.const_data_ptr(),
                y.mutable_data_ptr(), dtype, T, scale, expand,
                /*accumulate=*/weight.has_value()});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                   Tensor lam, Tensor gam,
                                                   std::vector<Tensor> packed, std::string format,
                                                   int64_t D, bool expand, double scale,
                                                   std::string path, OptionalTensor b_dense,
                                                   bool need_x, bool need_diagonals) {
  const Path p = path_of(path, weight.has_value());
  Adapter a{basis_of(packed, format, D, lam, gam), lam, gam, scale, expand};
  const int64_t T = check_linear(x, weight, {}, lam, a.in(), a.out());
  a.basis.b_dense = check_dense_b(a.basis, b_dense, x);
  check_output_gradient(dy, x, a.out());
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  Tensor dx, dlam, dgam;
  if (p == Path::factored && (need_x || need_diagonals)) {
    const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
    if (need_x) dx = weight ? as_contiguous(product(dyc, *weight)) : allocate_like(xc);
    if (need_diagonals) dlam = allocate_like(l), dgam = allocate_like(g);
    run(x, LinearBackward{a.basis, l.const_data_ptr(), g.const_data_ptr(), xc.const_data_ptr(),
                          dyc.const_data_ptr(), need_x ? dx.mutable_data_ptr() : nullptr, dtype, T,
                          scale, expand, /*accumulate=*/weight.has_value(),
                          need_diagonals ? dlam.mutable_data_ptr() : nullptr,
                          need_diagonals ? dgam.mutable_data_ptr() : nullptr});
    if (need_diagonals) dlam = cast(dlam, lam.scalar_type()), dgam = cast(dgam, gam.scalar_type());
  }
  if (p != Path::factored && need_x) {
    dx = product(dyc, formed(a, dtype, p == Path::merged ? weight : OptionalTensor()));
    if (p == Path::delta && weight) dx = sum_of(product(dyc, *weight), dx);
  }
  if (p != Path::factored && need_diagonals) {
    const Tensor dyT = torch::stable::transpose(rows(dyc, T), 0, 1);
    std::tie(dlam, dgam) = contract_delta(a, product(dyT, rows(xc, T)));
  }
  if (!need_x) dx = allocate({0}, x.scalar_type(), x);
  if (!need_diagonals)
    dlam = allocate({0}, lam.scalar_type(), lam), dgam = allocate({0}, gam.scalar_type(), gam);
  return {dx, dlam, dgam};
}

const Operators operators{
    {"linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lam, Tensor gam, Tensor[] packed, "
     "str format, SymInt D, bool expand, float scale, str path, Tensor? b_dense) -> Tensor",
     RANDLORA_BOX(linear)},
    {"linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lam, Tensor gam, "
     "Tensor[] packed, str format, SymInt D, bool expand, float scale, str path, "
     "Tensor? b_dense, bool need_x, bool need_diagonals) -> (Tensor, Tensor, Tensor)",
     RANDLORA_BOX(linear_backward)},
};

}  // namespace
}  // namespace randlora
