#include "block.h"

#include <cmath>

#include "../cpu/packing.h"
#include "block_sides.h"
#include "delta_weight.h"

namespace randlora {
namespace {

constexpr int64_t kFewTokens = 16;  // limit of the kernel that needs no dense B
constexpr Products::Limits kLimits{int64_t{64} << 20, 128, 8};  // tensor cores need aligned rows

// Powers of two that keep float16 in range. gamma is about 1 / d and lambda below 1, so their
// product would lose bits below 2^-14. Each element of A''s gradient sums D / G elements of the
// weight's gradient.
struct Range {
  double scaled = 1, gradient = 1;

  Range(const BlockBasis& b, DType dtype) {
    if (dtype != DType::f16) return;
    const int64_t d = b.groups * b.a_width();  // of the whole layer
    scaled = std::exp2(4 + std::round(std::log2(double(b.n > d ? b.n : d))));
    gradient = std::exp2(-std::ceil(std::log2(std::sqrt(double(b.b_width())))));
  }
};

Planes planes_of(const BlockBasis& b) {
  const auto* plus = static_cast<const uint64_t*>(b.b_planes->const_data_ptr());
  return {plus, nullptr, b.b_planes->size(2)};
}

Blocks raw_blocks(const BlockBasis& b) {
  return {b, planes_of(b), static_cast<const int8_t*>(b.a.const_data_ptr())};
}

const void* element(const Tensor& t, int64_t e, DType dtype) {
  return static_cast<const char*>(t.const_data_ptr()) + e * bytes_of(dtype);
}

// A matrix of all rows c. A slice of D uses some of them, its rows e.
struct AllRows {
  Tensor matrix;       // (.., a_width)
  int64_t of_e, of_c;  // which of its rows are e = 0 and c = 0

  AllRows(const BlockBasis& b, DType dtype, const Tensor& like, const OptionalTensor& made = {})
      : of_e(b.first > 0 ? b.groups : 0), of_c(of_e - b.first) {
    matrix = made ? *made : temporary({of_e + b.cycles() * b.groups, b.a_width()}, dtype, like);
  }
  void* rows_c(DType dtype) const {
    return const_cast<void*>(element(matrix, of_c * matrix.size(1), dtype));
  }
  // (cycles, b_chunks, a_width)
  Tensor rows_e(const BlockBasis& b, DType dtype) const {
    const int64_t w = b.a_width(), sizes[3] = {b.cycles(), b.b_chunks, w},
                  strides[3] = {b.groups * w, w, 1};
    return torch::stable::from_blob(const_cast<void*>(element(matrix, of_e * w, dtype)), {sizes, 3},
                                    {strides, 3}, matrix.device(), scalar_type(dtype));
  }
};

// The rows e of factor * A': (rows(), d / a_chunks) in `dtype`.
Tensor scaled_a(const BlockBasis& b, const Tensor& lam, const Tensor& gam, DType dtype,
                double factor) {
  const Tensor a = compute_copy(b.a, dtype), l = compute_copy(lam, dtype),
               g = compute_copy(gam, dtype);
  const AllRows all(b, dtype, lam);
  run(lam, &Kernels::scaled_basis, &CudaKernels::scaled_basis,
      {b.r, b.n, b.d, a.const_data_ptr(), l.const_data_ptr(), g.const_data_ptr(), all.rows_c(dtype),
       dtype, b.a_chunks, factor});
  if (b.b_chunks == b.groups) return all.matrix;
  const Tensor rows = torch::stable::clone(all.rows_e(b, dtype));  // outlives `all`
  return torch::stable::view(rows, {b.rows(), b.a_width()});
}

// (dlam, dgam) from the gradient (rows(), d / a_chunks) of A'.
std::tuple<Tensor, Tensor> contract(const BlockBasis& b, const Tensor& grad, const Tensor& lam,
                                    const Tensor& gam, DType dtype, double scale) {
  const Tensor a = compute_copy(b.a, dtype), l = compute_copy(lam, dtype),
               g = compute_copy(gam, dtype);
  const bool whole = b.b_chunks == b.groups;
  AllRows all(b, dtype, lam, whole ? OptionalTensor(grad) : std::nullopt);
  if (!whole) {
    torch::stable::zero_(all.matrix);
    Tensor rows = all.rows_e(b, dtype);
    torch::stable::copy_(rows, torch::stable::view(grad, {b.cycles(), b.b_chunks, b.a_width()}));
  }
  Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(lam, &Kernels::scaled_basis_backward, &CudaKernels::scaled_basis_backward,
      {b.r, b.n, b.d, a.const_data_ptr(), l.const_data_ptr(), g.const_data_ptr(), all.rows_c(dtype),
       dlam.mutable_data_ptr(), dgam.mutable_data_ptr(), dtype, b.a_chunks, scale});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

Side a_side(const BlockBasis& b, const Tensor& scaled, DType dtype) {
  const int64_t rows = b.a_rows(), width = b.a_width();
  const bool uniform = b.b_chunks == b.groups || rows % b.groups == 0;
  Side side{b.d, {}};
  for (int64_t h = 0; h < (uniform ? 1 : b.a_chunks); ++h) {
    const int64_t first = b.before(h * rows), count = b.before((h + 1) * rows) - first;
    side.parts.push_back({{element(scaled, first * width, dtype), uniform ? b.a_chunks : 1, count,
                           width, count * width, width, 1},
                          first,
                          count,
                          1,
                          h * width});
  }
  return side;
}

// B's blocks; row e is row e / b_chunks of block e % b_chunks.
MatrixBatch b_blocks(const BlockBasis& b, const Tensor& dense) {
  const int64_t Q = b.b_chunks, height = b.b_width();
  if (b.is_dense())
    return {dense.const_data_ptr(), 1, b.K(), height, 0, dense.stride(1), dense.stride(0)};
  return {dense.const_data_ptr(), Q, b.cycles(), height, height, Q * height, 1};
}

// Calls fn(b_rows, a_rows, offset) for the rows e that chunk g of D and chunk h of d share, in
// batches over h if all chunks share equally many. `offset` is where block (g, h) starts in a
// matrix with `g_step` elements between chunks of D and `h_step` between chunks of d.
template <class F>
void each_meeting(const BlockBasis& b, const Tensor& b_dense, const Tensor& a, DType dtype,
                  int64_t g_step, int64_t h_step, const F& fn) {
  const MatrixBatch B = b_blocks(b, b_dense);
  const int64_t Q = b.b_chunks, rows = b.a_rows(), width = b.a_width();
  const bool uniform = rows % b.groups == 0;
  const int64_t batch = uniform ? b.a_chunks : 1, cycles = rows / b.groups;
  for (int64_t g = 0; g < Q; ++g)
    for (int64_t h = 0; h < b.a_chunks; h += batch) {
      const int64_t begin = b.before(h * rows), end = b.before((h + 1) * rows);
      const int64_t first = begin + ((g - begin) % Q + Q) % Q;
      const int64_t count = first < end ? (end - first + Q - 1) / Q : 0;
      fn(MatrixBatch{element(b_dense, g * B.next + first / Q * B.row, dtype), batch, count, B.cols,
                     cycles * B.row, B.row, B.col},
         MatrixBatch{element(a, first * width, dtype), batch, count, width, cycles * Q * width,
                     Q * width, 1},
         g * g_step + h * h_step);
    }
}

}  // namespace

static Tensor expand_b(const BlockBasis& b, DType dtype) {
  const Planes planes = planes_of(b);
  Tensor out = allocate({b.rows(), b.b_width()}, scalar_type(dtype), *b.b_planes);
  if (runs_on_cuda(out)) {
    TorchDevice device(out);
    cuda_kernels().planes_to_dense(planes, b.rows(), b.b_width(), 1.0, out.mutable_data_ptr(),
                                   dtype, device);
  } else {
    TorchRuntime runtime;
    planes_to_dense(planes, b.rows(), b.b_width(), 1.0, out.mutable_data_ptr(), dtype, runtime);
  }
  return out;
}

Tensor dense_b(const BlockBasis& b, DType dtype) {
  if (b.is_dense()) return cast(*b.b, scalar_type(dtype));
  return b.b && b.b->scalar_type() == scalar_type(dtype) ? *b.b : expand_b(b, dtype);
}

Side b_side(const BlockBasis& b, const Tensor& dense, DType dtype) {
  const MatrixBatch B = b_blocks(b, dense);
  const int64_t Q = b.b_chunks, cycles = b.cycles();
  const bool uniform = b.row(0) >= 0 && b.row(b.rows() - 1) < b.K();
  if (uniform) return {b.D, {{B, 0, 1, Q, 0}}};
  Side side{b.D, {}};
  for (int64_t g = 0; g < Q; ++g) {
    const int64_t begin = b.row(g) < 0, end = cycles - (b.row(g + (cycles - 1) * Q) >= b.K());
    side.parts.push_back({{element(dense, g * B.next + begin * B.row, dtype), 1, end - begin,
                           B.cols, B.next, B.row, B.col},
                          g + begin * Q,
                          1,
                          Q,
                          g * B.cols});
  }
  return side;
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
  const Side A = a_side(b, scaled, dtype), B = b_side(b, dense, dtype);
  Products products(b, dtype, T, kLimits, x);
  const Tensor V = products.buffer();
  products.each_chunk([&](int64_t t) {
    products.down(expand ? A : B, x, t, V);
    products.up(expand ? B : A, V, y, t, scale / range.scaled, accumulate);
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
  Tensor gradient = temporary({b.rows(), b.a_width()}, dtype, x);
  if (T == 0) torch::stable::zero_(gradient);
  // Only dx needs A'. Otherwise `gradient` takes its place: it has the same shape.
  const Tensor scaled = dx ? scaled_a(b, lam, gam, dtype, range.scaled) : gradient;
  const Side A = a_side(b, scaled, dtype), B = b_side(b, dense, dtype),
             P = a_side(b, gradient, dtype);
  Products products(b, dtype, T, kLimits, x);
  const Tensor V = products.buffer();
  products.each_chunk([&](int64_t t) {
    if (dx || expand)  // U if expand, else V
      products.down(expand ? B : A, dy, t, V);
    if (dx) products.up(expand ? A : B, V, *dx, t, scale / range.scaled, accumulate);
    if (!need_diagonals) return;
    if (!expand) products.down(B, x, t, V);
    products.gradient(P, V, expand ? x : dy, t, range.gradient);
  });
  if (!need_diagonals) return {};
  return contract(b, gradient, lam, gam, dtype, scale / range.gradient);
}

void form_delta(const BlockBasis& b, const Tensor& lam, const Tensor& gam,
                const OptionalTensor& base, double scale, bool expand,
                std::optional<int64_t> rounding_seed, Tensor& out) {
  const DType dtype = activation_dtype(out, "out");
  if (runs_on_cuda(lam) && !b.is_dense()) {
    const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
    const Tensor w = base ? as_contiguous(*base) : out;
    TorchDevice device(lam);
    cuda_kernels().block_delta(
        {raw_blocks(b), l.const_data_ptr(), g.const_data_ptr(), base ? w.const_data_ptr() : nullptr,
         out.mutable_data_ptr(), dtype, scale, /*transposed=*/!expand, rounding_seed.has_value(),
         static_cast<uint64_t>(rounding_seed.value_or(0))},
        device);
    return;
  }
  // Block bases: 16-bit results are summed in float32 and rounded once. Dense bases use torch's
  // 16-bit GEMM, since float32 would take several times as long; with a rounding_seed it rounds dW
  // to nearest, and add_rounded then rounds the sum.
  const bool narrow = bytes_of(dtype) == 2, rounds = narrow && (!b.is_dense() || rounding_seed);
  const bool adds = base && !rounds;
  const DType compute = narrow && !b.is_dense() ? DType::f32 : dtype;
  const Range range(b, compute);
  const Tensor scaled = scaled_a(b, lam, gam, compute, range.scaled), dense = dense_b(b, compute);
  Tensor sum = rounds ? temporary({out.size(0), out.size(1)}, compute, lam) : out;
  const Tensor w = base ? as_contiguous(*base) : sum;
  const int64_t height = b.b_width(), width = b.a_width();
  each_meeting(b, dense, scaled, compute, expand ? height * b.d : height,
               expand ? width : width * b.D,
               [&](const MatrixBatch& B, const MatrixBatch& A, int64_t offset) {
                 const void* at = element(sum, offset, compute);
                 const MatrixBatch part =
                     expand ? MatrixBatch{at, B.count, height, width, width, b.d, 1}
                            : MatrixBatch{at, B.count, width, height, width * b.D, b.D, 1};
                 const MatrixBatch &left = expand ? B : A, &right = expand ? A : B;
                 multiply(part, left.transposed(), right, scale / range.scaled, adds ? 1 : 0,
                          compute, lam, adds ? element(w, offset, compute) : nullptr);
               });
  if (!rounds) return;
  const Tensor delta = cast(sum, ScalarType::Float);
  run(lam, &Kernels::add_rounded, &CudaKernels::add_rounded,
      {out.numel(), base ? w.const_data_ptr() : nullptr,
       static_cast<const float*>(delta.const_data_ptr()), out.mutable_data_ptr(), dtype,
       rounding_seed.has_value(), static_cast<uint64_t>(rounding_seed.value_or(0))});
}

std::tuple<Tensor, Tensor> contract_delta(const BlockBasis& b, const Tensor& grad,
                                          const Tensor& lam, const Tensor& gam, double scale,
                                          bool expand) {
  const DType dtype = activation_dtype(grad, "grad");
  const Range range(b, dtype);
  const Tensor dense = dense_b(b, dtype), G = as_contiguous(grad);
  const int64_t height = b.b_width(), width = b.a_width();
  Tensor gradient = temporary({b.rows(), width}, dtype, lam);
  each_meeting(
      b, dense, gradient, dtype, expand ? height * b.d : height, expand ? width : width * b.D,
      [&](const MatrixBatch& B, const MatrixBatch& out, int64_t offset) {
        const void* at = element(G, offset, dtype);
        const MatrixBatch chunk =
            expand ? MatrixBatch{at, B.count, height, width, width, b.d, 1}
                   : MatrixBatch{at, B.count, width, height, width * b.D, b.D, 1}.transposed();
        multiply(out, B, chunk, range.gradient, 0, dtype, lam);
      });
  return contract(b, gradient, lam, gam, dtype, scale / range.gradient);
}

}  // namespace randlora
