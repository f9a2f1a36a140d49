// torch.ops.randlora.hadamard_weight: W + dW on Hadamard bases, of one layer or of stacked experts,
// and its gradient.
#include "linear.h"

namespace randlora {
namespace {

// lam (experts, r, n) and gam (experts, n, d), or one without that dimension. s and row may have
// it, too.
class Experts {
 public:
  Experts(const Tensor& lam, const Tensor& gam, const Tensor& s, const Tensor& row,
          const Tensor& col, bool expand, double scale, DType dtype)
      : stacked_(lam.dim() == 3),
        count_(stacked_ ? lam.size(0) : 1),
        first_lam_(first(lam)),
        lam_(compute_copy(lam, dtype)),
        gam_(compute_copy(gam, dtype)) {
    const HadamardSizes sizes =
        check_hadamard(first_lam_, first(gam), signs(s, "s", "d"), signs(row, "row", "D"), col);
    RANDLORA_CHECK(gam.dim() == lam.dim() && (!stacked_ || gam.size(0) == count_),
                   "gam must have as many experts as lam ", describe(lam), ", got ", describe(gam));
    operands = {sizes,
                count_,
                lam_.const_data_ptr(),
                gam_.const_data_ptr(),
                floats(s),
                floats(row),
                floats(col),
                s.dim() == 2 ? sizes.d : 0,
                row.dim() == 2 ? sizes.D : 0,
                dtype,
                scale,
                /*transposed=*/!expand};
  }
  // As check_weight, of each expert's weight.
  void check(const Tensor& t, const char* name) const {
    RANDLORA_CHECK(!stacked_ || (t.dim() == 3 && t.size(0) == count_), name,
                   " must be (experts, out, in) = (", count_, ", ", out(), ", ", in(), "), got ",
                   describe(t));
    check_weight(first(t), name, out(), in(), first_lam_);
  }
  // As many tensors of these sizes.
  Tensor allocate_each(std::vector<int64_t> sizes, ScalarType type) const {
    if (stacked_) sizes.insert(sizes.begin(), count_);
    return allocate(sizes, type, lam_);
  }
  int64_t in() const { return operands.transposed ? operands.sizes.D : operands.sizes.d; }
  int64_t out() const { return operands.transposed ? operands.sizes.d : operands.sizes.D; }

  HadamardExperts operands;

 private:
  Tensor first(const Tensor& t) const {
    return stacked_ && t.dim() == 3 && t.size(0) > 0 ? torch::stable::select(t, 0, 0) : t;
  }
  Tensor signs(const Tensor& t, const char* name, const char* size) const {
    if (!stacked_ || t.dim() != 2) return t;
    RANDLORA_CHECK(t.size(0) == count_ && t.is_contiguous(), name, " must be (", size,
                   "), or contiguous (experts, ", size, ") with experts = ", count_, ", got ",
                   describe(t));
    return count_ > 0 ? torch::stable::select(t, 0, 0) : t;
  }

  const bool stacked_;
  const int64_t count_;
  const Tensor first_lam_, lam_, gam_;
};

// W + dW, or dW without a weight.
Tensor hadamard_weight(OptionalTensor weight, Tensor lam, Tensor gam, Tensor s, Tensor row,
                       Tensor col, bool expand, double scale) {
  const DType dtype = activation_dtype(weight ? *weight : lam, weight ? "weight" : "lam");
  const Experts all(lam, gam, s, row, col, expand, scale, dtype);
  if (weight) all.check(*weight, "weight");
  const Tensor out = all.allocate_each({all.out(), all.in()}, scalar_type(dtype));
  const Tensor base = weight ? as_contiguous(*weight) : out;
  run(lam, HadamardWeight{all.operands, weight ? base.const_data_ptr() : nullptr,
                          out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> hadamard_weight_backward(Tensor grad, Tensor lam, Tensor gam, Tensor s,
                                                    Tensor row, Tensor col, bool expand,
                                                    double scale) {
  const DType dtype = activation_dtype(grad, "grad");
  const Experts all(lam, gam, s, row, col, expand, scale, dtype);
  all.check(grad, "grad");
  const HadamardSizes& sizes = all.operands.sizes;
  if (!hadamard_fits(sizes, dtype, lam)) {
    const auto results = in_plain_torch("randlora::hadamard_weight_backward_plain", grad, lam, gam,
                                        s, row, col, expand, scale);
    return {torch::stable::detail::to<Tensor>(results[0]),
            torch::stable::detail::to<Tensor>(results[1])};
  }
  const ScalarType type = compute_type(dtype);
  const Tensor dlam = all.allocate_each({sizes.r, sizes.n}, type),
               dgam = all.allocate_each({sizes.n, sizes.d}, type), y = as_contiguous(grad);
  run(lam, HadamardWeightBackward{all.operands, y.const_data_ptr(), dlam.mutable_data_ptr(),
                                  dgam.mutable_data_ptr()});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

const Operators operators{
    {"hadamard_weight(Tensor? weight, " RANDLORA_HADAMARD ") -> Tensor",
     RANDLORA_BOX(hadamard_weight)},
    {"hadamard_weight_backward(Tensor grad, " RANDLORA_HADAMARD ") -> (Tensor, Tensor)",
     RANDLORA_BOX(hadamard_weight_backward)},
};

}  // namespace
}  // namespace randlora
