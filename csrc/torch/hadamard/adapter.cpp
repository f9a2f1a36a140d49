#include "adapter.h"

namespace randlora {
namespace {

HadamardSizes check_basis(const Tensor& lam, const Tensor& gam, const Tensor& a_signs,
                          const Tensor& row_signs, const Tensor& col_signs) {
  check_diagonals(lam, gam);
  const auto check_signs = [&](const Tensor& t, const char* name, const char* size) {
    RANDLORA_CHECK(
        t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.is_contiguous() && t.numel() > 0,
        name, " must be a contiguous float32 tensor (", size, "), got ", describe(t));
    check_same_device(t, name, lam, "lam");
  };
  check_signs(a_signs, "a_signs", "d");
  check_signs(row_signs, "row_signs", "D");
  check_signs(col_signs, "col_signs", "K");
  HadamardSizes sizes;
  sizes.D = row_signs.numel();
  sizes.d = a_signs.numel();
  sizes.r = lam.size(0);
  sizes.n = lam.size(1);
  RANDLORA_CHECK(sizes.d == gam.size(1), "a_signs must have d = ", gam.size(1), " numbers for gam ",
                 describe(gam), ", got ", describe(a_signs));
  RANDLORA_CHECK(col_signs.numel() == sizes.K(), "col_signs must have K = r * n = ", sizes.K(),
                 " numbers for lam ", describe(lam), ", got ", describe(col_signs));
  return sizes;
}

// Checks what all experts share, and the first of them as a layer.
HadamardSizes check_experts(const Tensor& lam, const Tensor& gam, const Tensor& a_signs,
                            const Tensor& row_signs, const Tensor& col_signs) {
  const int64_t experts = lam.size(0);
  RANDLORA_CHECK(gam.dim() == 3 && gam.size(0) == experts, "gam must have as many experts as lam ",
                 describe(lam), ", got ", describe(gam));
  RANDLORA_CHECK(experts <= 65535 || !runs_on_cuda(lam), "lam must have at most 65535 experts on ",
                 "CUDA, got ", describe(lam));
  const auto first = [&](const Tensor& t) {
    return experts > 0 ? torch::stable::select(t, 0, 0) : t;
  };
  const auto first_signs = [&](const Tensor& t, const char* name, const char* size) {
    if (t.dim() != 2) return t;
    RANDLORA_CHECK(t.size(0) == experts && t.is_contiguous(), name, " must be (", size,
                   "), or contiguous (experts, ", size, ") with experts = ", experts, ", got ",
                   describe(t));
    return first(t);
  };
  return check_basis(first(lam), first(gam), first_signs(a_signs, "a_signs", "d"),
                     first_signs(row_signs, "row_signs", "D"), col_signs);
}

}  // namespace

HadamardAdapter::HadamardAdapter(const Tensor& lam, const Tensor& gam, const Tensor& a_signs,
                                 const Tensor& row_signs, const Tensor& col_signs, bool expand,
                                 double scale)
    : lam(lam),
      gam(gam),
      a_signs(a_signs),
      row_signs(row_signs),
      col_signs(col_signs),
      expand(expand),
      scale(scale),
      has_experts(lam.dim() == 3),
      sizes(has_experts ? check_experts(lam, gam, a_signs, row_signs, col_signs)
                        : check_basis(lam, gam, a_signs, row_signs, col_signs)) {}

void check_weights(const Tensor& t, const char* name, const HadamardAdapter& adapter) {
  const int64_t out = adapter.out(), in = adapter.in();
  if (!adapter.has_experts) return check_weight(t, name, out, in, adapter.lam);
  RANDLORA_CHECK(t.dim() == 3 && t.size(0) == adapter.experts(), name,
                 " must be (experts, out, in) = (", adapter.experts(), ", ", out, ", ", in,
                 "), got ", describe(t));
  check_weight(torch::stable::select(t, 0, 0), name, out, in, adapter.lam);
}

bool serves(const HadamardAdapter& adapter, const Tensor& x) {
  if (!runs_on_cuda(x)) return true;
  return has_kernels(x) && hadamard_fits(adapter.sizes, activation_dtype(x, "x"), card_of(x));
}

}  // namespace randlora
