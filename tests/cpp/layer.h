// A layer on ternary bases with the equations of docs/math.md as loops in double, and the checks of
// operators that the tests of the CPU and the CUDA kernels share.
#pragma once
#include "arrays.h"

namespace randlora {

enum class Form { lists, planes };

struct Layer {
  int64_t D, d, r, n = (d + r - 1) / r, K = r * n;
  double scale = 0.7;
  Ternary A, B;
  Values lam = normal(K, 1), gam = normal(n * d, 2);

  Layer(int64_t D_, int64_t d_, int64_t r_, double density, ThreadRuntime&& rt = ThreadRuntime(1))
      : D(D_),
        d(d_),
        r(r_),
        A(r, d, density, unsigned(d + r), rt),
        B(D, K, density, unsigned(D + r), rt) {}

  TernaryBases basis(Form form) const {
    TernaryBases b;
    b.D = D, b.d = d, b.r = r, b.n = n;
    b.a = A.by_row.view();
    if (form == Form::planes)
      b.b_planes = B.planes;
    else
      b.b_rows = B.by_row.view(), b.b_cols = B.by_column.view();
    return b;
  }
  // A' (K, d)
  Values scaled() const {
    Values S(K * d);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k)
        S[c * d + k] = lam[c] * A.dense[c / n * d + k] * gam[c % n * d + k];
    return S;
  }
  // dW (D, d), or (d, D)
  Values delta(bool reduce) const {
    return reduce ? product(scaled(), B.dense, d, D, K, true, scale, true)
                  : product(B.dense, scaled(), D, d, K, false, scale);
  }
  // dlam and dgam from AP = A * P, P (K, d)
  std::pair<Values, Values> gradients(const Values& P) const {
    Values dlam(K, 0.0), dgam(n * d, 0.0);
    for (int64_t c = 0; c < K; ++c)
      for (int64_t k = 0; k < d; ++k) {
        const double AP = A.dense[c / n * d + k] * P[c * d + k];
        dlam[c] += AP * gam[c % n * d + k];
        dgam[c % n * d + k] += AP * lam[c];
      }
    return {dlam, dgam};
  }
};

template <class Kernels>
void set_case_of(const Kernels& kernels, const Layer& L, const TernaryBases& basis, DType dtype,
                 int64_t T, bool reduce, int64_t skip) {
  set_case("D %ld d %ld r %ld T %ld planes %d dtype %d reduce %d skip %ld %s", long(L.D), long(L.d),
           long(L.r), long(T), basis.has_planes(), int(dtype), reduce, long(skip),
           kernels.settings().c_str());
}

// y, dx, dlam and dgam, also where only some of them are wanted.
template <class Kernels>
void check_linear(Kernels& kernels, const Layer& L, const TernaryBases& basis, DType dtype,
                  int64_t T, bool expand, double bound) {
  set_case_of(kernels, L, basis, dtype, T, !expand, 0);
  const int64_t in = expand ? L.d : L.D, out = expand ? L.D : L.d;
  const DType compute = compute_dtype(dtype);
  const Array lam(compute, L.lam), gam(compute, L.gam);
  const Array x(dtype, normal(T * in, 3)), dy(dtype, normal(T * out, 4));
  const Array y(dtype, T * out), dx(dtype, T * in), dx_alone(dtype, T * in);
  const Array dlam(compute, L.K), dgam(compute, L.n * L.d);
  const Array dlam_alone(compute, L.K), dgam_alone(compute, L.n * L.d);

  const Values xs = x.values(), dys = dy.values(), dW = L.delta(!expand);
  const Values of_dW = product(dys, xs, out, in, T, false, L.scale, true);
  const auto [want_dlam, want_dgam] =
      L.gradients(product(L.B.dense, of_dW, L.K, L.d, L.D, !expand, 1, true));

  IndependentLinear call{};
  call.basis = basis;
  call.lam = lam.get();
  call.gam = gam.get();
  call.dtype = dtype;
  call.T = T;
  call.scale = L.scale;
  IndependentLinear forward = call;
  forward.up = expand;
  forward.from = x.get();
  forward.to = y.get();
  kernels.independent_linear(forward);
  IndependentLinear back = call;
  back.up = !expand;
  back.from = dy.get();
  back.to = dx.get();
  back.other = x.get();
  back.dlam = dlam.get();
  back.dgam = dgam.get();
  kernels.independent_linear(back);
  compare("y", y, product(xs, dW, T, out, in, true), bound);
  compare("dx", dx, product(dys, dW, T, in, out, false), bound);
  compare("dlam", dlam, want_dlam, bound);
  compare("dgam", dgam, want_dgam, bound);
  back.to = nullptr, back.dlam = dlam_alone.get(), back.dgam = dgam_alone.get();
  kernels.independent_linear(back);
  back.to = dx_alone.get(), back.dlam = back.dgam = nullptr;
  kernels.independent_linear(back);
  EXPECT(dx_alone.raw() == dx.raw() && dlam_alone.raw() == dlam.raw() &&
             dgam_alone.raw() == dgam.raw(),
         "what is not wanted changes what is,");
}

// A', which it returns, and its gradients; every matrix `skip` elements off alignment. A is dense.
template <class Kernels>
Array check_scaled_basis(Kernels& kernels, Layer L, DType dtype, int64_t skip) {
  for (double& a : L.A.dense) a *= 1.75;
  set_case_of(kernels, L, L.basis(Form::lists), dtype, 0, false, skip);
  const DType compute = compute_dtype(dtype);
  const Array A(compute, L.A.dense, skip), lam(compute, L.lam, skip), gam(compute, L.gam, skip),
      grad(dtype, normal(L.K * L.d, 3), skip), dlam(compute, L.K, skip),
      dgam(compute, L.n * L.d, skip);
  Array out(dtype, L.K * L.d, skip);
  kernels.scaled_basis({L.r, L.n, L.d, A.get(), lam.get(), gam.get(), out.get(), dtype});
  compare("A'", out, L.scaled(), tolerance(dtype));
  kernels.scaled_basis_backward(
      {L.r, L.n, L.d, A.get(), lam.get(), gam.get(), grad.get(), dlam.get(), dgam.get(), dtype});
  const auto [want_dlam, want_dgam] = L.gradients(grad.values());
  compare("dlam of A'", dlam, want_dlam, tolerance(compute));
  compare("dgam of A'", dgam, want_dgam, tolerance(compute));
  return out;
}

}  // namespace randlora
