// torch.ops.randlora.scaled_basis: A'[j * n + i, k] = lam[j, i] * A[j, k] * gam[i, k].
#include "backend.h"

namespace randlora {
namespace {

void check(const Tensor& A, const Tensor& lam, const Tensor& gam) {
  activation_dtype(A, "A");
  activation_dtype(lam, "lam");
  activation_dtype(gam, "gam");
  check_same_device(lam, "lam", A, "A");
  check_same_device(gam, "gam", A, "A");
  RANDLORA_CHECK(A.dim() == 2, "A must be (r, d), got ", describe(A));
  RANDLORA_CHECK(lam.dim() == 2 && lam.size(0) == A.size(0),
                 "lam must be (r, n) with r = ", A.size(0), ", got ", describe(lam));
  RANDLORA_CHECK(gam.dim() == 2 && gam.size(0) == lam.size(1) && gam.size(1) == A.size(1),
                 "gam must be (n, d) = (", lam.size(1), ", ", A.size(1), "), got ", describe(gam));
}

Tensor scaled_basis(Tensor A, Tensor lam, Tensor gam) {
  check(A, lam, gam);
  if (!has_kernels(A))
    return std::get<0>(call_torch<Tensor>("randlora::scaled_basis_plain", A, lam, gam));
  const int64_t r = A.size(0), n = lam.size(1), d = A.size(1);
  const DType dtype = activation_dtype(A, "A");
  const Tensor A_copy = compute_copy(A, dtype);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  Tensor out = allocate({r * n, d}, A.scalar_type(), A);
  ScaledBasis p{};
  p.r = r;
  p.n = n;
  p.d = d;
  p.A = A_copy.const_data_ptr();
  p.lam = lam_copy.const_data_ptr();
  p.gam = gam_copy.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.dtype = dtype;
  run(A, p);
  return out;
}

std::tuple<Tensor, Tensor> scaled_basis_backward(Tensor grad, Tensor A, Tensor lam, Tensor gam) {
  check(A, lam, gam);
  const int64_t r = A.size(0), n = lam.size(1), d = A.size(1);
  RANDLORA_CHECK(grad.dim() == 2 && grad.size(0) == r * n && grad.size(1) == d,
                 "grad must be (K, d) = (", r * n, ", ", d, "), got ", describe(grad));
  check_same_device(grad, "grad", A, "A");
  if (!has_kernels(A))
    return call_torch<Tensor, Tensor>("randlora::scaled_basis_backward_plain", grad, A, lam, gam);
  const DType dtype = activation_dtype(grad, "grad");
  const Tensor A_copy = compute_copy(A, dtype);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  const Tensor grad_copy = as_contiguous(grad);
  Tensor dlam = allocate_like(lam_copy), dgam = allocate_like(gam_copy);
  ScaledBasisBackward p{};
  p.r = r;
  p.n = n;
  p.d = d;
  p.A = A_copy.const_data_ptr();
  p.lam = lam_copy.const_data_ptr();
  p.gam = gam_copy.const_data_ptr();
  p.grad = grad_copy.const_data_ptr();
  p.dlam = dlam.mutable_data_ptr();
  p.dgam = dgam.mutable_data_ptr();
  p.dtype = dtype;
  run(A, p);
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

const Operators operators{
    {"scaled_basis(Tensor A, Tensor lam, Tensor gam) -> Tensor", RANDLORA_BOX(scaled_basis)},
    {"scaled_basis_backward(Tensor grad, Tensor A, Tensor lam, Tensor gam) -> (Tensor, Tensor)",
     RANDLORA_BOX(scaled_basis_backward)},
};

}  // namespace
}  // namespace randlora
