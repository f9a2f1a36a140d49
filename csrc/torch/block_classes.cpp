// The A side of block bases by classes of columns (csrc/cpu/block_classes.h): gamma times the signs
// of A's columns is r matrices n x n, which torch's GEMM multiplies. Only float32 and float64: in
// 16 bits, dgamma would be rounded after each of these small chunks of tokens.
#include "block_sides.h"

namespace randlora {
namespace {

constexpr Products::Limits kLimits{int64_t{4} << 20, 64, 1};  // V should stay in the caches

class ClassProducts : public Products {
 public:
  ClassProducts(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                int64_t T, double scale)
      : Products(b, activation_dtype(x, "x"), T, kLimits, x),
        b_(b),
        dtype_(activation_dtype(x, "x")),
        scale_(scale),
        lam_(compute_copy(lam, dtype_)),
        gam_(signed_columns(compute_copy(gam, dtype_), 1)),
        dense_(dense_b(b, dtype_)),
        A(side_of(gam_)),
        B(b_side(b, dense_, dtype_)) {}

  // The A side whose block for each class is a part of m (n, d), laid out like gamma. Its products
  // lack lambda and the Hadamard matrix, which mix() applies.
  Side side_of(const Tensor& m) const {
    const MatrixBatch blocks{m.const_data_ptr(), b_.r, b_.n, b_.n, b_.n, b_.d, 1};
    return {b_.d, {{blocks, 0, b_.n, 1, 0}}};
  }

  // `to` = after * H (before * `from`), each factor being lambda if true and 1 if false.
  void mix(const Tensor& from, const Tensor& to, bool before, bool after) const {
    TorchRuntime runtime;
    const void* lam = lam_.const_data_ptr();
    cpu_kernels().hadamard_mix(
        {b_.r, b_.r / b_.a_chunks, b_.n, tokens(), stride(), from.const_data_ptr(),
         to.mutable_data_ptr(), before ? lam : nullptr, after ? lam : nullptr, dtype_},
        runtime);
  }
  void add_dots(const Tensor& U, const Tensor& V, const Tensor& dlam) const {
    TorchRuntime runtime;
    cpu_kernels().row_dots({b_.K(), tokens(), stride(), U.const_data_ptr(), V.const_data_ptr(),
                            dlam.mutable_data_ptr(), dtype_, scale_},
                           runtime);
  }

  // scale * m (n, d), times the signs of A's columns.
  Tensor signed_columns(const Tensor& m, double scale) const {
    Tensor out = allocate_like(m);
    TorchRuntime runtime;
    cpu_kernels().sign_columns(
        {b_.n, b_.d, b_.a_width(), b_.r / b_.a_chunks, b_.a.const_data_ptr<int8_t>(),
         m.const_data_ptr(), out.mutable_data_ptr(), dtype_, scale},
        runtime);
    return out;
  }

 private:
  const BlockBasis& b_;
  DType dtype_;
  double scale_;
  Tensor lam_, gam_, dense_;

 public:
  const Side A, B;
};

}  // namespace

bool factors_by_classes(const BlockBasis& b, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return !runs_on_cuda(x) && (type == ScalarType::Float || type == ScalarType::Double) &&
         !b.is_dense() && b.d % b.r == 0 && b.r > b.a_chunks && b.b_chunks == b.groups &&
         b.first == 0;
}

void class_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate) {
  ClassProducts products(b, lam, gam, x, T, scale);
  const Tensor V = products.buffer();
  products.each_chunk([&](int64_t t) {
    products.down(expand ? products.A : products.B, x, t, V);
    products.mix(V, V, /*before=*/!expand, /*after=*/expand);
    products.up(expand ? products.B : products.A, V, y, t, scale, accumulate);
  });
}

std::tuple<Tensor, Tensor> class_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals) {
  ClassProducts products(b, lam, gam, x, T, scale);
  const DType dtype = activation_dtype(x, "x");
  Tensor dlam = allocate({b.r, b.n}, scalar_type(dtype), x);
  Tensor gradient = allocate({b.n, b.d}, scalar_type(dtype), x);
  torch::stable::zero_(dlam);
  if (T == 0) torch::stable::zero_(gradient);
  const Side P = products.side_of(gradient);
  const Tensor U = products.buffer(), V = products.buffer();
  // V is the product of the A side with the tensor of d features.
  const Tensor& of_d = expand ? x : dy;
  products.each_chunk([&](int64_t t) {
    if (expand) products.down(products.B, dy, t, U);
    if (!expand || need_diagonals) products.down(products.A, of_d, t, V);
    if (!expand && dx) {
      products.mix(V, U, /*before=*/false, /*after=*/true);
      products.up(products.B, U, *dx, t, scale, accumulate);
    }
    if (!expand && need_diagonals) products.down(products.B, x, t, U);
    if (need_diagonals) {
      products.mix(V, V, /*before=*/false, /*after=*/false);
      products.add_dots(U, V, dlam);
    }
    if (!expand && !need_diagonals) return;
    products.mix(U, U, /*before=*/true, /*after=*/false);
    if (expand && dx) products.up(products.A, U, *dx, t, scale, accumulate);
    if (need_diagonals) products.gradient(P, U, of_d, t, 1);
  });
  if (!need_diagonals) return {};
  return {cast(dlam, lam.scalar_type()),
          cast(products.signed_columns(gradient, scale), gam.scalar_type())};
}

}  // namespace randlora
