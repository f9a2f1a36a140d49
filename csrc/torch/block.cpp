#include "block.h"

#include <cmath>

#include "../cpu/packing.h"
#include "block_sides.h"
#include "delta_weight.h"

namespace randlora {
namespace {

constexpr int64_t kFewTokens = 16;                  // that the kernel without a dense B is made for
constexpr int64_t kChunkBytes = int64_t{64} << 20;  // limit for V or U; more tokens are chunked

// Powers of two that keep float16 in range. gamma is about 1 / d and lambda below 1, so their
// product would lose bits below 2^-14. The gradient of A' sums D / G of the terms that a weight's
// gradient has one of.
struct Range {
  double scaled = 1, gradient = 1;

  Range(const BlockBasis& b, DType dtype) {
    if (dtype != DType::f16) return;
    scaled = std::exp2(4 + std::round(std::log2(double(b.n > b.d ? b.n : b.d))));
    gradient = std::exp2(-std::ceil(std::log2(std::sqrt(double(b.b_width())))));
  }
};

Planes planes_of(const BlockBasis& b) {
  const auto* plus = static_cast<const uint64_t*>(b.b_planes->const_data_ptr());
  const int64_t words = b.b_planes->size(2);
  return {plus, plus + b.K() * words, words};
}

Blocks raw_blocks(const BlockBasis& b) {
  return {b.D, b.d, b.r, b.n, b.G, planes_of(b), static_cast<const int8_t*>(b.a.const_data_ptr())};
}

// factor * A' (K, d / G) in `dtype`: row c = j * n + i holds chunk j / (r / G) of the columns.
Tensor scaled_a(const BlockBasis& b, const Tensor& lam, const Tensor& gam, DType dtype,
                double factor) {
  const Tensor a = compute_copy(b.a, dtype), l = compute_copy(lam, dtype),
               g = compute_copy(gam, dtype);
  Tensor out = allocate({b.K(), b.a_width()}, scalar_type(dtype), lam);
  run(lam, &Kernels::scaled_basis, &CudaKernels::scaled_basis,
      {b.r, b.n, b.d, a.const_data_ptr(), l.const_data_ptr(), g.const_data_ptr(),
       out.mutable_data_ptr(), dtype, b.G, factor});
  return out;
}

// (dlam, dgam) from the gradient (K, d / G) of A'.
std::tuple<Tensor, Tensor> contract(const BlockBasis& b, const Tensor& grad, const Tensor& lam,
                                    const Tensor& gam, DType dtype, double scale) {
  const Tensor a = compute_copy(b.a, dtype), l = compute_copy(lam, dtype),
               g = compute_copy(gam, dtype);
  Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(lam, &Kernels::scaled_basis_backward, &CudaKernels::scaled_basis_backward,
      {b.r, b.n, b.d, a.const_data_ptr(), l.const_data_ptr(), g.const_data_ptr(),
       grad.const_data_ptr(), dlam.mutable_data_ptr(), dgam.mutable_data_ptr(), dtype, b.G, scale});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

Side a_side(const BlockBasis& b, const Tensor& scaled) {
  const int64_t rows = b.K() / b.G, width = b.a_width();
  return {{scaled.const_data_ptr(), b.G, rows, width, rows * width, width, 1}, b.d, 1};
}

// The products of one call, chunk after chunk of tokens.
class Products {
 public:
  Products(const BlockBasis& b, DType dtype, int64_t T, const Tensor& like)
      : dtype_(dtype), T_(T), like_(like) {
    const int64_t fit = kChunkBytes / (b.K() * bytes_of(dtype));
    chunk_ = fit < 128 ? 128 : fit / 128 * 128;
    if (chunk_ > T) chunk_ = T;
    stride_ = (chunk_ + 7) / 8 * 8;  // tensor cores need aligned rows
    V_ = allocate({b.K(), stride_}, scalar_type(dtype), like);
  }

  // fn(first token) for every chunk.
  template <class F>
  void each_chunk(const F& fn) {
    for (int64_t t = 0; t < T_; t += chunk_) {
      tokens_ = T_ - t < chunk_ ? T_ - t : chunk_;
      fn(t);
    }
  }

  // V = blocks x^T
  void down(const Side& s, const Tensor& x, int64_t t) {
    multiply(s.rows_of(V_.const_data_ptr(), tokens_, stride_), s.blocks,
             s.chunks_of(at(x, t, s), tokens_).transposed(), 1, 0, dtype_, like_);
  }
  // y = beta * y + alpha * V^T blocks
  void up(const Side& s, const Tensor& y, int64_t t, double alpha, double beta) {
    multiply(s.chunks_of(at(y, t, s), tokens_),
             s.rows_of(V_.const_data_ptr(), tokens_, stride_).transposed(), s.blocks, alpha, beta,
             dtype_, like_);
  }
  // gradient = alpha * V x, added from the second chunk on
  void gradient(const Side& s, const Tensor& x, int64_t t, double alpha, const Tensor& gradient) {
    MatrixBatch out = s.blocks;
    out.data = gradient.const_data_ptr();
    multiply(out, s.rows_of(V_.const_data_ptr(), tokens_, stride_),
             s.chunks_of(at(x, t, s), tokens_), alpha, t == 0 ? 0 : 1, dtype_, like_);
  }

 private:
  const void* at(const Tensor& x, int64_t t, const Side& s) const {
    return static_cast<const char*>(x.const_data_ptr()) + t * s.features * bytes_of(dtype_);
  }

  DType dtype_;
  int64_t T_, chunk_, stride_, tokens_ = 0;
  const Tensor& like_;
  Tensor V_;
};

// Calls fn(b_rows, a_rows, offset) for the rows c that chunk g of D and chunk h of d share, in
// batches over h if all of them have equally many. `offset` is where their block of a matrix
// starts that has `g_step` elements between chunks of D and `h_step` between chunks of d.
template <class F>
void each_meeting(const BlockBasis& b, const Tensor& b_dense, const void* a, DType dtype,
                  int64_t g_step, int64_t h_step, const F& fn) {
  const MatrixBatch B = b_side(b, b_dense).blocks;
  const int64_t G = b.G, rows = b.K() / G, width = b.a_width();
  const bool uniform = rows % G == 0;
  const auto from = [&](const void* p, int64_t elements) {
    return static_cast<const char*>(p) + elements * bytes_of(dtype);
  };
  for (int64_t g = 0; g < G; ++g)
    for (int64_t h = 0; h < (uniform ? 1 : G); ++h) {
      const int64_t first = h * rows + ((g - h * rows) % G + G) % G, end = (h + 1) * rows;
      const int64_t count = first < end ? (end - first + G - 1) / G : 0, batch = uniform ? G : 1;
      fn(MatrixBatch{from(B.data, first % G * B.next + first / G * B.row), batch, count, B.cols,
                     rows / G * B.row, B.row, B.col},
         MatrixBatch{from(a, first * width), batch, count, width, rows * width, G * width, 1},
         g * g_step + h * h_step);
    }
}

}  // namespace

static Tensor expand_b(const BlockBasis& b, DType dtype) {
  const Planes planes = planes_of(b);
  Tensor out = allocate({b.K(), b.b_width()}, scalar_type(dtype), *b.b_planes);
  if (runs_on_cuda(out)) {
    TorchDevice device(out);
    cuda_kernels().planes_to_dense(planes, b.K(), b.b_width(), 1.0, out.mutable_data_ptr(), dtype,
                                   device);
  } else {
    TorchRuntime runtime;
    planes_to_dense(planes, b.K(), b.b_width(), 1.0, out.mutable_data_ptr(), dtype, runtime);
  }
  return out;
}

Tensor dense_b(const BlockBasis& b, DType dtype) {
  if (b.is_dense()) return cast(*b.b, scalar_type(dtype));
  return b.b && b.b->scalar_type() == scalar_type(dtype) ? *b.b : expand_b(b, dtype);
}

void block_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate) {
  const DType dtype = activation_dtype(x, "x");
  if (factors_by_classes(b, x))
    return class_linear(b, lam, gam, x, y, T, scale, expand, accumulate);
  if (runs_on_cuda(x) && !b.b && T <= kFewTokens) {
    const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
    TorchDevice device(x);
    cuda_kernels().block_linear(
        {raw_blocks(b), l.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr(),
         y.mutable_data_ptr(), dtype, T, scale, expand, accumulate},
        device);
    return;
  }
  const Range range(b, dtype);
  const Tensor scaled = scaled_a(b, lam, gam, dtype, range.scaled), dense = dense_b(b, dtype);
  const Side A = a_side(b, scaled), B = b_side(b, dense);
  Products products(b, dtype, T, x);
  products.each_chunk([&](int64_t t) {
    products.down(expand ? A : B, x, t);
    products.up(expand ? B : A, y, t, scale / range.scaled, accumulate);
  });
}

std::tuple<Tensor, Tensor> block_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals) {
  const DType dtype = activation_dtype(x, "x");
  if (factors_by_classes(b, x))
    return class_linear_backward(b, lam, gam, x, dy, dx, T, scale, expand, accumulate,
                                 need_diagonals);
  const Range range(b, dtype);
  const Tensor dense = dense_b(b, dtype);
  Tensor gradient = allocate({b.K(), b.a_width()}, scalar_type(dtype), x);
  // Only dx needs A'; the gradient has its shape.
  const Tensor scaled = dx ? scaled_a(b, lam, gam, dtype, range.scaled) : gradient;
  const Side A = a_side(b, scaled), B = b_side(b, dense);
  if (T == 0) torch::stable::zero_(gradient);
  Products products(b, dtype, T, x);
  products.each_chunk([&](int64_t t) {
    if (dx || expand) products.down(expand ? B : A, dy, t);  // U, or V where d is the output side
    if (dx) products.up(expand ? A : B, *dx, t, scale / range.scaled, accumulate);
    if (!need_diagonals) return;
    if (!expand) products.down(B, x, t);
    products.gradient(A, expand ? x : dy, t, range.gradient, gradient);
  });
  if (!need_diagonals) return {};
  return contract(b, gradient, lam, gam, dtype, scale / range.gradient);
}

Tensor form_delta(const BlockBasis& b, const Tensor& lam, const Tensor& gam,
                  const OptionalTensor& base, double scale, int64_t out_features,
                  int64_t in_features, bool expand, DType dtype,
                  std::optional<int64_t> rounding_seed) {
  if (runs_on_cuda(lam) && !b.is_dense()) {
    const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
    Tensor out = allocate({out_features, in_features}, scalar_type(dtype), lam);
    const Tensor w = base ? as_contiguous(*base) : out;
    TorchDevice device(lam);
    cuda_kernels().block_delta(
        {raw_blocks(b), l.const_data_ptr(), g.const_data_ptr(), base ? w.const_data_ptr() : nullptr,
         out.mutable_data_ptr(), dtype, scale, /*transposed=*/!expand, rounding_seed.has_value(),
         static_cast<uint64_t>(rounding_seed.value_or(0))},
        device);
    return out;
  }
  // 16-bit results are summed in float32 and rounded once: by torch's 16-bit GEMM for dense bases,
  // whose products would take several times as long in float32. Signs have no bits to lose.
  const bool narrow = bytes_of(dtype) == 2, rounds = narrow && (!b.is_dense() || rounding_seed);
  const bool adds = base && !rounds;
  const DType compute = narrow && !b.is_dense() ? DType::f32 : dtype;
  const Range range(b, compute);
  const Tensor scaled = scaled_a(b, lam, gam, compute, range.scaled), dense = dense_b(b, compute);
  Tensor sum = adds ? torch::stable::clone(as_contiguous(*base))
                    : allocate({out_features, in_features}, scalar_type(compute), lam);
  const int64_t height = b.b_width(), width = b.a_width();
  each_meeting(
      b, dense, scaled.const_data_ptr(), compute, expand ? height * b.d : height,
      expand ? width : width * b.D,
      [&](const MatrixBatch& B, const MatrixBatch& A, int64_t offset) {
        const void* at =
            static_cast<const char*>(sum.const_data_ptr()) + offset * bytes_of(compute);
        const MatrixBatch out = expand
                                    ? MatrixBatch{at, B.count, height, width, width, b.d, 1}
                                    : MatrixBatch{at, B.count, width, height, width * b.D, b.D, 1};
        const MatrixBatch &left = expand ? B : A, &right = expand ? A : B;
        multiply(out, left.transposed(), right, scale / range.scaled, adds ? 1 : 0, compute, lam);
      });
  if (!rounds) return sum;
  const Tensor delta = cast(sum, ScalarType::Float);
  const Tensor w = base ? as_contiguous(*base) : sum;
  Tensor out = allocate({out_features, in_features}, scalar_type(dtype), lam);
  run(lam, &Kernels::add_rounded, &CudaKernels::add_rounded,
      {out.numel(), base ? w.const_data_ptr() : nullptr,
       static_cast<const float*>(delta.const_data_ptr()), out.mutable_data_ptr(), dtype,
       rounding_seed.has_value(), static_cast<uint64_t>(rounding_seed.value_or(0))});
  return out;
}

std::tuple<Tensor, Tensor> contract_delta(const BlockBasis& b, const Tensor& grad,
                                          const Tensor& lam, const Tensor& gam, double scale,
                                          bool expand) {
  const DType dtype = activation_dtype(grad, "grad");
  const Range range(b, dtype);
  const Tensor dense = dense_b(b, dtype), G = as_contiguous(grad);
  const int64_t height = b.b_width(), width = b.a_width();
  Tensor gradient = allocate({b.K(), width}, scalar_type(dtype), lam);
  each_meeting(
      b, dense, gradient.const_data_ptr(), dtype, expand ? height * b.d : height,
      expand ? width : width * b.D,
      [&](const MatrixBatch& B, const MatrixBatch& out, int64_t offset) {
        const void* at = static_cast<const char*>(G.const_data_ptr()) + offset * bytes_of(dtype);
        const MatrixBatch chunk =
            expand ? MatrixBatch{at, B.count, height, width, width, b.d, 1}
                   : MatrixBatch{at, B.count, width, height, width * b.D, b.D, 1}.transposed();
        multiply(out, B, chunk, range.gradient, 0, dtype, lam);
      });
  return contract(b, gradient, lam, gam, dtype, scale / range.gradient);
}

}  // namespace randlora
