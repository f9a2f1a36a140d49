// torch.ops.randlora.hadamard_*: a linear layer with an adapter on Hadamard bases.
//
//   y = x W^T + bias + x dW^T,   dW = scale * B (lambda * A * gamma), transposed unless `expand`
//
// torch's GEMMs compute the class products, our kernels the rest (core/hadamard.h).
#include <algorithm>
#include <cmath>

#include "linear.h"

namespace randlora {
namespace {

struct HadamardBasis {
  HadamardSizes sizes;
  const Tensor &lam, &gam, &s, &row, &col;
  double scale;
  bool expand;

  int64_t in() const { return expand ? sizes.d : sizes.D; }
  int64_t out() const { return expand ? sizes.D : sizes.d; }
};

const int8_t* signs(const Tensor& t) { return static_cast<const int8_t*>(t.const_data_ptr()); }

HadamardBasis check_basis(const Tensor& lam, const Tensor& gam, const Tensor& s, const Tensor& row,
                          const Tensor& col, double scale, int64_t first_row, int64_t first_column,
                          bool expand) {
  check_floating(lam, "lam");
  check_floating(gam, "gam");
  RANDLORA_CHECK(lam.dim() == 2 && lam.numel() > 0, "lam must be (r, n), got ", describe(lam));
  const int64_t r = lam.size(0), n = lam.size(1);
  const auto check_signs = [&](const Tensor& t, const char* name, const char* size) {
    RANDLORA_CHECK(
        t.scalar_type() == ScalarType::Char && t.dim() == 1 && t.is_contiguous() && t.numel() > 0,
        name, " must be a contiguous int8 tensor (", size, ") of -1 and +1, got ", describe(t));
    check_same_device(t, name, lam, "lam");
  };
  check_signs(s, "s", "d");
  check_signs(row, "row", "D");
  check_signs(col, "col", "K");
  RANDLORA_CHECK(col.numel() == r * n, "col must have K = r * n = ", r * n, " signs for lam ",
                 describe(lam), ", got ", describe(col));
  check_same_device(gam, "gam", lam, "lam");
  RANDLORA_CHECK(gam.dim() == 2 && gam.size(0) == n && gam.size(1) == s.numel(),
                 "gam must be (n, d) = (", n, ", ", s.numel(), "), got ", describe(gam));
  const int64_t last_row = (int64_t{1} << 32) - row.numel();  // the specification's rows end there
  RANDLORA_CHECK(first_row >= 0 && first_row <= last_row,
                 "first_row must be in [0, 2^32 - D] = ", "[0, ", last_row, "], got ", first_row);
  RANDLORA_CHECK(first_column >= 0 && first_column <= r * n - s.numel(), "first_column must be in ",
                 "[0, K - d] = [0, ", r * n - s.numel(), "], got ", first_column);
  const HadamardSizes sizes{row.numel(), s.numel(), r, n, first_row, first_column};
  return {sizes, lam, gam, s, row, col, scale, expand};
}

// Powers of two that keep float16 in range: gamma is about 1 / K, and each number of w is a sum of
// D terms and then of r.
struct Range {
  double gamma = 1, back = 1;

  Range(const HadamardSizes& s, DType dtype) {
    if (dtype != DType::f16) return;
    gamma = std::exp2(std::round(std::log2(double(s.K()))) - 3);
    back = std::exp2(-std::ceil(std::log2(double(s.D) * double(s.r)) / 2));
  }
};

// The steps of one call, for one chunk of tokens at a time. x and y have d features in inner, outer
// and gradient, D in up and down; `t` is the chunk's first token.
class Steps {
 public:
  Steps(const HadamardBasis& b, const Tensor& like, int64_t T)
      : b_(b), s_(b.sizes), like_(like), dtype_(activation_dtype(like, "x")), range_(s_, dtype_) {
    lam_ = compute_copy(b.lam, dtype_);
    const Tensor gam = compute_copy(b.gam, dtype_);
    gam_ = temporary({s_.n, s_.d}, dtype_, like);
    run(like, HadamardGamma{s_, gam.const_data_ptr(), signs(b.s), gam_.mutable_data_ptr(), dtype_,
                            range_.gamma});
    const int64_t bytes = s_.classes() * s_.n * bytes_of(dtype_);
    const int64_t limit = (in_caches() ? int64_t{1} : int64_t{64}) << 20;
    int64_t most = std::max(limit / bytes, kFewest);
    if (in_spans()) most = std::min(most, kSpan);
    chunks_ = (T + most - 1) / most;
    // Rows of z that one token reads should not all fall into the same sets of a cache.
    if (in_caches() && T >= kFewest)
      while (chunks_ < T && (T + chunks_ - 1) / chunks_ % 16 == 0) ++chunks_;
    largest_ = chunks_ ? (T + chunks_ - 1) / chunks_ : 0;
    slots_ = runs_on_cuda(like) ? std::min<int64_t>(largest_, 512)
                                : std::min<int64_t>((largest_ + 15) / 16, 64);
    T_ = T;
  }

  // fn(first token) for chunks of about equally many tokens.
  template <class F>
  void each_chunk(const F& fn) {
    for (chunk_ = 0; chunk_ < chunks_; ++chunk_) {
      const int64_t begin = chunk_ * T_ / chunks_;
      tokens_ = (chunk_ + 1) * T_ / chunks_ - begin;
      fn(begin);
    }
  }

  // (classes, tokens, n), with room for a vector behind it.
  Tensor for_classes() const {
    return temporary({s_.classes() * largest_ * s_.n + 64}, dtype_, like_);
  }
  void reserve_gradients() {
    if (in_spans()) spans_ = std::min((T_ + kSpan - 1) / kSpan, chunks_);
    P_ = temporary({spans_, s_.classes(), s_.n, s_.n}, dtype_, like_);
    sums_ = allocate({chunks_ * slots_, s_.K()}, compute_type(dtype_), like_);
    if (T_ == 0) torch::stable::zero_(P_);
  }

  // z = the class products with x (T, d).
  void inner(const Tensor& x, int64_t t, const Tensor& z) const {
    each_part([&](const Part& p) {
      multiply(at_classes(z, p), columns(x, t, p), gamma(p).transposed(), 1, 0, dtype_, like_);
    });
  }
  // Adds the class products with w to y (T, d), or sets y unless `accumulate`. `room` is scratch.
  void outer(const Tensor& w, const Tensor& y, int64_t t, bool accumulate,
             const Tensor& room) const {
    const double scale = b_.scale / (range_.gamma * range_.back);
    if (!in_caches()) {
      each_part([&](const Part& p) {
        multiply(columns(y, t, p), at_classes(w, p), gamma(p), scale, accumulate, dtype_, like_);
      });
      return;
    }
    each_part([&](const Part& p) {
      MatrixBatch out = at_classes(room, p);
      out.data = element(room, p.first * out.next + p.place), out.cols = p.width;
      multiply(out, at_classes(w, p), gamma(p), 1, 0, dtype_, like_);
    });
    TorchRuntime runtime;
    cpu_kernels().hadamard_add({s_, room.const_data_ptr(), const_cast<void*>(element(y, t * s_.d)),
                                dtype_, tokens_, scale, accumulate},
                               runtime);
  }
  // The gradient of gamma from w and x (T, d), added to that of the chunks before in its span.
  void gradient(const Tensor& w, const Tensor& x, int64_t t) const {
    const auto span_of = [&](int64_t chunk) { return chunk * spans_ / chunks_; };
    const int64_t span = span_of(chunk_), first_class = span * s_.classes();
    const bool add = chunk_ > 0 && span_of(chunk_ - 1) == span;
    each_part([&](const Part& p) {
      const void* P = element(P_, (first_class + p.first) * s_.n * s_.n + p.place);
      const MatrixBatch out{P, p.count, s_.n, p.width, s_.n * s_.n, s_.n, 1};
      multiply(out, at_classes(w, p).transposed(), columns(x, t, p), 1, add, dtype_, like_);
    });
  }
  // Adds to y (T, D) what z gives by mix and transform, or sets y unless `accumulate`.
  void up(const Tensor& z, const Tensor& y, int64_t t, bool accumulate) const {
    run(like_, HadamardUp{s_, z.const_data_ptr(), lam_.const_data_ptr(), signs(b_.row),
                          signs(b_.col), const_cast<void*>(element(y, t * s_.D)), dtype_, tokens_,
                          b_.scale / range_.gamma, accumulate});
  }
  // w from y (T, D); with z, also the sums for the gradient of lambda.
  void down(const Tensor& y, int64_t t, const Tensor& w, const Tensor* z) const {
    void* sums = nullptr;
    if (z)
      sums = static_cast<char*>(sums_.mutable_data_ptr()) +
             chunk_ * slots_ * s_.K() * (dtype_ == DType::f64 ? 8 : 4);
    run(like_, HadamardDown{s_, element(y, t * s_.D), lam_.const_data_ptr(), signs(b_.row),
                            signs(b_.col), w.mutable_data_ptr(), z ? z->const_data_ptr() : nullptr,
                            sums, slots_, dtype_, tokens_, range_.back});
  }
  std::tuple<Tensor, Tensor> diagonals() const {
    const ScalarType type = compute_type(dtype_);
    Tensor dlam = allocate({s_.r, s_.n}, type, like_), dgam = allocate({s_.n, s_.d}, type, like_);
    const Tensor P = spans_ == 1 ? P_ : torch::stable::sum(P_, {{0}});
    run(like_, HadamardDiagonals{s_, P.const_data_ptr(), sums_.const_data_ptr(), chunks_ * slots_,
                                 signs(b_.s), signs(b_.col), dlam.mutable_data_ptr(),
                                 dgam.mutable_data_ptr(), dtype_, b_.scale / range_.gamma,
                                 b_.scale / range_.back});
    return {cast(dlam, b_.lam.scalar_type()), cast(dgam, b_.gam.scalar_type())};
  }

 private:
  // Neighboring classes with equally many columns: the whole ones, or one that the edge of a rank's
  // slice cuts or that d does not fill.
  struct Part {
    int64_t first, count;   // classes, counted from the slice's first
    int64_t column, width;  // the first class's first column; columns per class
    int64_t place;          // of that column in its class
  };
  template <class F>
  void each_part(const F& fn) const {
    const int64_t n = s_.n, place = s_.first_column % n;
    int64_t column = 0, m = 0;
    if (place != 0 || s_.d < n) {
      const int64_t width = std::min(n - place, s_.d);
      fn(Part{0, 1, 0, width, place});
      column = width, m = 1;
    }
    const int64_t whole = (s_.d - column) / n;
    if (whole > 0) fn(Part{m, whole, column, n, 0});
    column += whole * n, m += whole;
    if (column < s_.d) fn(Part{m, 1, column, s_.d - column, 0});
  }

  const void* element(const Tensor& t, int64_t e) const {
    return static_cast<const char*>(t.const_data_ptr()) + e * bytes_of(dtype_);
  }
  MatrixBatch at_classes(const Tensor& z, const Part& p) const {
    const int64_t each = tokens_ * s_.n;
    return {element(z, p.first * each), p.count, tokens_, s_.n, each, s_.n, 1};
  }
  MatrixBatch columns(const Tensor& x, int64_t t, const Part& p) const {
    return {element(x, t * s_.d + p.column), p.count, tokens_, p.width, p.width, s_.d, 1};
  }
  MatrixBatch gamma(const Part& p) const {
    return {element(gam_, p.column), p.count, s_.n, p.width, p.width, s_.d, 1};
  }

  // Whether z and w of one chunk should stay in the caches. In 16 bits each chunk rounds the
  // gradient of gamma, and on a GPU each costs launches: there only memory limits a chunk.
  bool in_caches() const { return !runs_on_cuda(like_) && bytes_of(dtype_) > 2; }
  // Whether the gradient of gamma is summed in spans of about kSpan tokens, added at the end. On
  // AMD's processors MKL computes products of at most 128 elements (here n x n) token by token, and
  // their error grows with the root of the number of tokens.
  bool in_spans() const { return in_caches() && s_.n <= 11; }
  static constexpr int64_t kFewest = 64, kSpan = 512;

  const HadamardBasis& b_;
  const HadamardSizes& s_;
  const Tensor& like_;
  DType dtype_;
  Range range_;
  Tensor lam_, gam_, P_, sums_;
  int64_t T_, chunks_, largest_, slots_, spans_ = 1, chunk_ = 0, tokens_ = 0;
};

// W + dW, or dW without a base; (out, in) in the dtype of `out`.
void form(const HadamardBasis& b, const OptionalTensor& base, std::optional<int64_t> rounding_seed,
          const Tensor& out) {
  const DType dtype = activation_dtype(out, "out");
  const Tensor lam = compute_copy(b.lam, dtype), gam = compute_copy(b.gam, dtype);
  const Tensor w = base ? as_contiguous(*base) : out;
  run(b.lam, HadamardWeight{b.sizes, lam.const_data_ptr(), gam.const_data_ptr(), signs(b.s),
                            signs(b.row), signs(b.col), base ? w.const_data_ptr() : nullptr,
                            out.mutable_data_ptr(), dtype, b.scale,
                            /*transposed=*/!b.expand, rounding_seed.has_value(),
                            static_cast<uint64_t>(rounding_seed.value_or(0))});
}

Tensor merged(const HadamardBasis& b, const Tensor& weight) {
  const Tensor out = temporary({b.out(), b.in()}, activation_dtype(weight, "weight"), weight);
  form(b, weight, {}, out);
  return out;
}

Tensor hadamard_linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
                       Tensor s, Tensor row, Tensor col, double scale, int64_t first_row,
                       int64_t first_column, bool expand, bool merge) {
  const HadamardBasis b =
      check_basis(lam, gam, s, row, col, scale, first_row, first_column, expand);
  const int64_t T = check_linear(x, weight, bias, lam, b.in(), b.out());
  RANDLORA_CHECK(!merge || weight, "merge adds to the weight, but weight is None");
  const Tensor xc = as_contiguous(x);
  if (merge) return torch_linear(xc, merged(b, *weight), bias);
  Tensor y = weight ? as_contiguous(torch_linear(xc, *weight, bias)) : like_output(xc, b.out());
  Steps steps(b, xc, T);
  const Tensor z = steps.for_classes(), room = expand ? z : steps.for_classes();
  steps.each_chunk([&](int64_t t) {
    if (expand) {
      steps.inner(xc, t, z);
      steps.up(z, y, t, weight.has_value());
    } else {
      steps.down(xc, t, z, nullptr);
      steps.outer(z, y, t, weight.has_value(), room);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> hadamard_linear_backward(
    Tensor dy, Tensor x, OptionalTensor weight, Tensor lam, Tensor gam, Tensor s, Tensor row,
    Tensor col, double scale, int64_t first_row, int64_t first_column, bool expand, bool merge,
    bool need_x, bool need_diagonals) {
  const HadamardBasis b =
      check_basis(lam, gam, s, row, col, scale, first_row, first_column, expand);
  const int64_t T = check_linear(x, weight, {}, lam, b.in(), b.out());
  check_output_gradient(dy, x, b.out());
  RANDLORA_CHECK(!merge || weight, "merge adds to the weight, but weight is None");
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  Tensor dx, dlam, dgam;
  if (need_x && merge)
    dx = product(dyc, merged(b, *weight));
  else if (need_x)
    dx = weight ? as_contiguous(product(dyc, *weight)) : allocate_like(xc);
  const bool add_x = need_x && !merge;
  if (add_x || need_diagonals) {
    Steps steps(b, xc, T);
    if (need_diagonals) steps.reserve_gradients();
    const Tensor z = steps.for_classes(), w = steps.for_classes();
    const Tensor &of_d = expand ? xc : dyc, &of_D = expand ? dyc : xc;
    steps.each_chunk([&](int64_t t) {
      if (need_diagonals || !expand) steps.inner(of_d, t, z);
      if (add_x && !expand) steps.up(z, dx, t, weight.has_value());
      if (need_diagonals || expand) steps.down(of_D, t, w, need_diagonals ? &z : nullptr);
      if (add_x && expand) steps.outer(w, dx, t, weight.has_value(), z);
      if (need_diagonals) steps.gradient(w, of_d, t);
    });
    if (need_diagonals) std::tie(dlam, dgam) = steps.diagonals();
  }
  if (!need_x) dx = allocate({0}, x.scalar_type(), x);
  if (!need_diagonals)
    dlam = allocate({0}, lam.scalar_type(), lam), dgam = allocate({0}, gam.scalar_type(), gam);
  return {dx, dlam, dgam};
}

Tensor hadamard_weight(OptionalTensor base, Tensor lam, Tensor gam, Tensor s, Tensor row,
                       Tensor col, double scale, int64_t first_row, int64_t first_column,
                       bool expand, std::optional<int64_t> rounding_seed) {
  const HadamardBasis b =
      check_basis(lam, gam, s, row, col, scale, first_row, first_column, expand);
  const Tensor& like = base ? *base : lam;
  const DType dtype = activation_dtype(like, base ? "weight" : "lam");
  if (base) check_weight(*base, "weight", b.out(), b.in(), lam);
  RANDLORA_CHECK(!rounding_seed || bytes_of(dtype) == 2,
                 "rounding_seed rounds to bfloat16 or float16, but weight is ", describe(like));
  const Tensor out = allocate({b.out(), b.in()}, scalar_type(dtype), like);
  form(b, base, rounding_seed, out);
  return out;
}

const Operators operators{
    {"hadamard_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lam, Tensor gam, Tensor s, "
     "Tensor row, Tensor col, float scale, int first_row, int first_column, bool expand, "
     "bool merge) -> Tensor",
     RANDLORA_BOX(hadamard_linear)},
    {"hadamard_linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lam, Tensor gam, "
     "Tensor s, Tensor row, Tensor col, float scale, int first_row, int first_column, "
     "bool expand, bool merge, bool need_x, bool need_diagonals) -> (Tensor, Tensor, Tensor)",
     RANDLORA_BOX(hadamard_linear_backward)},
    {"hadamard_weight(Tensor? weight, Tensor lam, Tensor gam, Tensor s, Tensor row, Tensor col, "
     "float scale, int first_row, int first_column, bool expand, int? rounding_seed) -> Tensor",
     RANDLORA_BOX(hadamard_weight)},
};

}  // namespace
}  // namespace randlora
