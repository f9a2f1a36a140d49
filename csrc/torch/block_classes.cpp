// The A side of block bases by classes of columns (csrc/cpu/block_classes.h): gamma with the signs
// of its columns is r matrices n x n, which torch's GEMM multiplies. Float32 and float64; in 16
// bits the sums of dgamma over these small chunks of tokens would be rounded at every chunk.
#include "block_sides.h"

namespace randlora {
namespace {

constexpr int64_t kChunkBytes = int64_t{4} << 20;  // V should stay in the processor's caches

class ClassProducts {
 public:
  ClassProducts(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                int64_t T, double scale)
      : b_(b),
        dtype_(activation_dtype(x, "x")),
        T_(T),
        scale_(scale),
        like_(x),
        lam_(compute_copy(lam, dtype_)),
        gam_(signed_columns(compute_copy(gam, dtype_), 1)),
        dense_(dense_b(b, dtype_)),
        B_(b_side(b, dense_)) {
    const int64_t fit = kChunkBytes / (b.K() * bytes_of(dtype_)) / 64 * 64;
    chunk_ = fit < 64 ? 64 : fit;
    if (chunk_ > T) chunk_ = T;
  }

  Tensor buffer() const { return allocate({b_.K(), chunk_}, scalar_type(dtype_), like_); }

  // fn(first token) for every chunk.
  template <class F>
  void each_chunk(const F& fn) {
    for (int64_t t = 0; t < T_; t += chunk_) {
      tokens_ = T_ - t < chunk_ ? T_ - t : chunk_;
      fn(t);
    }
  }

  // V = B^T x^T;  y = [y +] scale * V^T B^T
  void down_b(const Tensor& x, int64_t t, const Tensor& V) const {
    multiply(B_.rows_of(V.const_data_ptr(), tokens_, chunk_), B_.blocks,
             B_.chunks_of(at(x, t, b_.D), tokens_).transposed(), 1, 0, dtype_, like_);
  }
  void up_b(const Tensor& V, const Tensor& y, int64_t t, bool accumulate) const {
    multiply(B_.chunks_of(at(y, t, b_.D), tokens_),
             B_.rows_of(V.const_data_ptr(), tokens_, chunk_).transposed(), B_.blocks, scale_,
             accumulate, dtype_, like_);
  }
  // The same by the classes of A', without lambda and Hadamard's matrix, which mix() applies.
  void down_a(const Tensor& x, int64_t t, const Tensor& V) const {
    multiply(rows(V), classes(gam_), columns(x, t).transposed(), 1, 0, dtype_, like_);
  }
  void up_a(const Tensor& V, const Tensor& y, int64_t t, bool accumulate) const {
    multiply(columns(y, t), rows(V).transposed(), classes(gam_), scale_, accumulate, dtype_, like_);
  }
  // The gradient of gam_, added from the second chunk on.
  void gradient(const Tensor& V, const Tensor& x, int64_t t, const Tensor& gradient) const {
    multiply(classes(gradient), rows(V), columns(x, t), 1, t == 0 ? 0 : 1, dtype_, like_);
  }

  // to = after * H (before * from); lambda stands where `true` does.
  void mix(const Tensor& from, const Tensor& to, bool before, bool after) const {
    TorchRuntime runtime;
    const void* lam = lam_.const_data_ptr();
    cpu_kernels().hadamard_mix(
        {b_.r, b_.r / b_.G, b_.n, tokens_, chunk_, from.const_data_ptr(), to.mutable_data_ptr(),
         before ? lam : nullptr, after ? lam : nullptr, dtype_},
        runtime);
  }
  void add_dots(const Tensor& U, const Tensor& V, const Tensor& dlam) const {
    TorchRuntime runtime;
    cpu_kernels().row_dots({b_.K(), tokens_, chunk_, U.const_data_ptr(), V.const_data_ptr(),
                            dlam.mutable_data_ptr(), dtype_, scale_},
                           runtime);
  }

  // scale * m (n, d) with the signs of A's columns.
  Tensor signed_columns(const Tensor& m, double scale) const {
    Tensor out = allocate_like(m);
    TorchRuntime runtime;
    cpu_kernels().sign_columns(
        {b_.n, b_.d, b_.a_width(), b_.r / b_.G, b_.a.const_data_ptr<int8_t>(), m.const_data_ptr(),
         out.mutable_data_ptr(), dtype_, scale},
        runtime);
    return out;
  }

 private:
  const void* at(const Tensor& x, int64_t t, int64_t features) const {
    return static_cast<const char*>(x.const_data_ptr()) + t * features * bytes_of(dtype_);
  }
  MatrixBatch classes(const Tensor& m) const {
    return {m.const_data_ptr(), b_.r, b_.n, b_.n, b_.n, b_.d, 1};
  }
  MatrixBatch rows(const Tensor& V) const {
    return {V.const_data_ptr(), b_.r, b_.n, tokens_, b_.n * chunk_, chunk_, 1};
  }
  MatrixBatch columns(const Tensor& x, int64_t t) const {
    return {at(x, t, b_.d), b_.r, tokens_, b_.n, b_.n, b_.d, 1};
  }

  const BlockBasis& b_;
  DType dtype_;
  int64_t T_, chunk_, tokens_ = 0;
  double scale_;
  const Tensor& like_;
  Tensor lam_, gam_, dense_;
  Side B_;
};

}  // namespace

bool factors_by_classes(const BlockBasis& b, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return !runs_on_cuda(x) && (type == ScalarType::Float || type == ScalarType::Double) &&
         !b.is_dense() && b.d % b.r == 0 && b.r > b.G;
}

void class_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate) {
  ClassProducts products(b, lam, gam, x, T, scale);
  const Tensor V = products.buffer();
  products.each_chunk([&](int64_t t) {
    if (expand) {
      products.down_a(x, t, V);
      products.mix(V, V, /*before=*/false, /*after=*/true);
      products.up_b(V, y, t, accumulate);
    } else {
      products.down_b(x, t, V);
      products.mix(V, V, /*before=*/true, /*after=*/false);
      products.up_a(V, y, t, accumulate);
    }
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
  const Tensor U = products.buffer(), V = products.buffer();
  // V is that of the side's input in the forward: of x if d is the input side, else of dy.
  const Tensor& of_d = expand ? x : dy;
  products.each_chunk([&](int64_t t) {
    if (expand) products.down_b(dy, t, U);
    if (!expand || need_diagonals) products.down_a(of_d, t, V);
    if (!expand && dx) {
      products.mix(V, U, /*before=*/false, /*after=*/true);
      products.up_b(U, *dx, t, accumulate);
    }
    if (!expand && need_diagonals) products.down_b(x, t, U);
    if (need_diagonals) {
      products.mix(V, V, /*before=*/false, /*after=*/false);
      products.add_dots(U, V, dlam);
    }
    if (!expand && !need_diagonals) return;
    products.mix(U, U, /*before=*/true, /*after=*/false);
    if (expand && dx) products.up_a(U, *dx, t, accumulate);
    if (need_diagonals) products.gradient(U, of_d, t, gradient);
  });
  if (!need_diagonals) return {};
  return {cast(dlam, lam.scalar_type()),
          cast(products.signed_columns(gradient, scale), gam.scalar_type())};
}

}  // namespace randlora
