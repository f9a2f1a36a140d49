// torch.ops.randlora.linear: y = x W^T + bias + scale * x dW^T by one of three paths.
//
//   factored  both sides of the basis applied to x; dW never exists
//   delta     dW is formed, then two GEMMs; the base output is untouched
//   merged    W + dW is formed, then one GEMM; in 16 bits the sum is rounded, to nearest or
//             stochastically; backward must get the same rounding_seed
//
// Without a weight the result is only the adapter's part, for base layers of any kind.
#include "backend.h"
#include "block.h"
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
void check_dense(const PackedBasis& basis, const std::vector<Tensor>& packed, const Tensor& x) {
  const Basis* b = std::get_if<Basis>(&basis);
  const BlockBasis* blocks = std::get_if<BlockBasis>(&basis);
  if (b ? !b->b_dense : !blocks->b || blocks->is_dense()) return;
  RANDLORA_CHECK(!b || runs_on_cuda(x),
                 "packed holds a dense B, which only the CUDA kernels use; x is ", describe(x));
  RANDLORA_CHECK(packed.back().scalar_type() == x.scalar_type(), "packed: the dense B is ",
                 describe(packed.back()), " but x is ", describe(x), "; they must have one dtype");
}

// What a call needs besides tensors.
struct Call {
  Sizes s;
  DType dtype;
  double scale;
  bool expand;  // d is the input side
  std::optional<int64_t> rounding_seed;
};

// W + dW if there is a base, otherwise dW; shape (out, in). Only a 16-bit sum is rounded
// stochastically.
template <class B>
Tensor formed(const B& b, const Call& c, const Tensor& lam, const Tensor& gam,
              const OptionalTensor& base) {
  const bool rounds = base && bytes_of(c.dtype) == 2;
  Tensor out = temporary({c.s.out, c.s.in}, c.dtype, lam);
  form_delta(b, lam, gam, base, c.scale, c.expand, rounds ? c.rounding_seed : std::nullopt, out);
  return out;
}

// y += scale * x dW^T, or y = ... unless `accumulate`.
void add_factored(const Basis& b, const Call& c, const Tensor& lam, const Tensor& gam,
                  const Tensor& x, Tensor& y, bool accumulate) {
  const Tensor l = compute_copy(lam, c.dtype), g = compute_copy(gam, c.dtype);
  run(x, &Kernels::linear, &CudaKernels::linear,
      {b, l.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr(), y.mutable_data_ptr(), c.dtype,
       c.s.T, c.scale, c.expand, accumulate});
}
void add_factored(const BlockBasis& b, const Call& c, const Tensor& lam, const Tensor& gam,
                  const Tensor& x, Tensor& y, bool accumulate) {
  block_linear(b, lam, gam, x, y, c.s.T, c.scale, c.expand, accumulate);
}

// The gradients of add_factored from x and dy: sets `dx` if not null, or with `accumulate` adds to
// it; returns (dlam, dgam) if `need_diagonals`.
std::tuple<Tensor, Tensor> factored_backward(const Basis& b, const Call& c, const Tensor& lam,
                                             const Tensor& gam, const Tensor& x, const Tensor& dy,
                                             Tensor* dx, bool accumulate, bool need_diagonals) {
  const Tensor l = compute_copy(lam, c.dtype), g = compute_copy(gam, c.dtype);
  Tensor dlam, dgam;
  if (need_diagonals) dlam = allocate_like(l), dgam = allocate_like(g);
  run(x, &Kernels::linear_backward, &CudaKernels::linear_backward,
      {b, l.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr(), dy.const_data_ptr(),
       dx ? dx->mutable_data_ptr() : nullptr, c.dtype, c.s.T, c.scale, c.expand, accumulate,
       need_diagonals ? dlam.mutable_data_ptr() : nullptr,
       need_diagonals ? dgam.mutable_data_ptr() : nullptr});
  if (!need_diagonals) return {};
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}
std::tuple<Tensor, Tensor> factored_backward(const BlockBasis& b, const Call& c, const Tensor& lam,
                                             const Tensor& gam, const Tensor& x, const Tensor& dy,
                                             Tensor* dx, bool accumulate, bool need_diagonals) {
  return block_linear_backward(b, lam, gam, x, dy, dx, c.s.T, c.scale, c.expand, accumulate,
                               need_diagonals);
}

// (dlam, dgam) for the paths that form dW.
std::tuple<Tensor, Tensor> formed_gradients(const Basis& b, const Call& c, const Tensor& lam,
                                            const Tensor& gam, const Tensor& x, const Tensor& dy) {
  const Tensor dyT = torch::stable::transpose(rows(dy, c.s, c.s.out), 0, 1);
  return contract_delta(b, product(dyT, rows(x, c.s, c.s.in)), lam, gam, c.scale, c.expand);
}
// Uses the cheaper of two ways: contracting dy^T x, or the factored backward, which is cheap for
// block bases, and for dense bases if tokens are few.
std::tuple<Tensor, Tensor> formed_gradients(const BlockBasis& b, const Call& c, const Tensor& lam,
                                            const Tensor& gam, const Tensor& x, const Tensor& dy) {
  const double T = double(c.s.T), K = double(b.K()), D = double(b.D), d = double(b.d);
  if (b.is_dense() && T * K * (D + d) > (T + K) * D * d) {
    const Tensor dyT = torch::stable::transpose(rows(dy, c.s, c.s.out), 0, 1);
    return contract_delta(b, product(dyT, rows(x, c.s, c.s.in)), lam, gam, c.scale, c.expand);
  }
  return factored_backward(b, c, lam, gam, x, dy, nullptr, false, true);
}

template <class B>
Tensor forward(const B& b, Path path, const Call& c, const Tensor& x, const OptionalTensor& weight,
               const OptionalTensor& bias, const Tensor& lam, const Tensor& gam) {
  if (path == Path::merged) return torch_linear(x, formed(b, c, lam, gam, weight), bias);
  if (path == Path::delta) {
    const Tensor y = torch_linear(x, formed(b, c, lam, gam, {}), {});
    return weight ? sum_of(torch_linear(x, *weight, bias), y) : y;
  }
  Tensor y;
  if (weight) {
    y = as_contiguous(torch_linear(x, *weight, bias));
  } else {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = c.s.out;
    y = allocate(shape, x.scalar_type(), x);
  }
  add_factored(b, c, lam, gam, x, y, /*accumulate=*/weight.has_value());
  return y;
}

// (dx, dlam, dgam); those that nobody needs are left undefined.
template <class B>
std::tuple<Tensor, Tensor, Tensor> backward(const B& b, Path path, const Call& c, const Tensor& x,
                                            const Tensor& dy, const OptionalTensor& weight,
                                            const Tensor& lam, const Tensor& gam, bool need_x,
                                            bool need_diagonals) {
  Tensor dx, dlam, dgam;
  if (path == Path::factored) {
    if (need_x) dx = weight ? as_contiguous(product(dy, *weight)) : allocate_like(x);
    std::tie(dlam, dgam) = factored_backward(b, c, lam, gam, x, dy, need_x ? &dx : nullptr,
                                             weight.has_value(), need_diagonals);
    return {dx, dlam, dgam};
  }
  if (need_x) {
    const OptionalTensor base = path == Path::merged ? weight : OptionalTensor();
    dx = product(dy, formed(b, c, lam, gam, base));
    if (path == Path::delta && weight) dx = sum_of(product(dy, *weight), dx);
  }
  if (need_diagonals) std::tie(dlam, dgam) = formed_gradients(b, c, lam, gam, x, dy);
  return {dx, dlam, dgam};
}

Tensor linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
              std::vector<Tensor> packed, double scale, int64_t out_features, std::string path,
              std::optional<bool> expand, std::optional<int64_t> rounding_seed) {
  const Path p = path_of(path, weight.has_value());
  const Sizes s = check(x, weight, bias, lam, out_features);
  const PackedBasis basis = basis_of(packed, lam, gam, s.in, s.out, expand);
  check_dense(basis, packed, x);
  const Call c{s, activation_dtype(x, "x"), scale, expands(expand, s.in, s.out), rounding_seed};
  const Tensor xc = as_contiguous(x);
  const auto run = [&](const auto& b) { return forward(b, p, c, xc, weight, bias, lam, gam); };
  return std::visit(run, basis);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                   Tensor lam, Tensor gam,
                                                   std::vector<Tensor> packed, double scale,
                                                   std::string path, bool need_x,
                                                   bool need_diagonals, std::optional<bool> expand,
                                                   std::optional<int64_t> rounding_seed) {
  const Path p = path_of(path, weight.has_value());
  RANDLORA_CHECK(dy.dim() == x.dim() && dy.scalar_type() == x.scalar_type(), "dy is ", describe(dy),
                 ", which does not fit x ", describe(x));
  const Sizes s = check(x, weight, {}, lam, dy.size(-1));
  check_same_device(dy, "dy", x, "x");
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    RANDLORA_CHECK(dy.size(i) == x.size(i), "dy is ", describe(dy), ", which does not fit x ",
                   describe(x));
  const PackedBasis basis = basis_of(packed, lam, gam, s.in, s.out, expand);
  check_dense(basis, packed, x);
  Tensor dx, dlam, dgam;
  if (need_x || need_diagonals) {
    const Call c{s, activation_dtype(x, "x"), scale, expands(expand, s.in, s.out), rounding_seed};
    const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
    const auto run = [&](const auto& b) {
      return backward(b, p, c, xc, dyc, weight, lam, gam, need_x, need_diagonals);
    };
    std::tie(dx, dlam, dgam) = std::visit(run, basis);
  }
  if (!need_x) dx = allocate({0}, x.scalar_type(), x);
  if (!need_diagonals)
    dlam = allocate({0}, lam.scalar_type(), lam), dgam = allocate({0}, gam.scalar_type(), gam);
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
      "float scale, SymInt out_features, str path, bool? expand=None, int? rounding_seed=None) "
      "-> Tensor");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lam, Tensor gam, "
      "Tensor[] packed, float scale, str path, bool need_x, bool need_diagonals, "
      "bool? expand=None, int? rounding_seed=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(randlora, CPU, m) { randlora::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(randlora, CUDA, m) { randlora::implement(m); }
