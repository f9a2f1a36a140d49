// torch.ops.randlora.hadamard_*: a linear layer with an adapter on Hadamard bases.
//
//   y = x W^T + bias + x dW^T,   dW = scale * B (lambda * A * gamma), transposed unless `expand`
//
// torch's GEMMs compute the class products, our kernels the rest (core/hadamard.h).
//
// On the CPU the base layer's product comes first, and the adapter adds to it. On a card it comes
// last and adds to the adapter: it multiplies for longer than it takes to read what it adds to,
// while the adapter's last kernel would wait for that. With a bias, which torch adds only in a
// product of its own, it comes first there, too.
#include <algorithm>

#include "linear.h"

#include <time.h>
#include <immintrin.h>
#include <cstdio>
#include <cstring>
#include <map>
namespace randlora {
namespace {

#pragma GCC push_options
#pragma GCC target("avx512f,fma,avx512vl")
namespace few {
typedef float V __attribute__((vector_size(64)));
static inline V ld(const float* p) { V v; memcpy(&v, p, 64); return v; }
static inline void st(float* p, V v) { memcpy(p, &v, 64); }
static inline V fma_(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline V all(float f) { return (V)_mm512_set1_ps(f); }
static void outer(const float* w, const float* g, int64_t ldg, float* out, int64_t n, const float* sign, float scale, bool add) {
  for (int64_t k = 0; k < n; k += 32)
    for (int64_t t = 0; t < 16; t += 8) {
      V s[8][2] = {};
      for (int64_t i = 0; i < n; ++i) {
        V b[2]; for (int c = 0; c < 2; ++c) b[c] = ld(g + i * ldg + k + 16 * c);
        for (int q = 0; q < 8; ++q) { V a = all(w[(t + q) * n + i]); for (int c = 0; c < 2; ++c) s[q][c] = fma_(a, b[c], s[q][c]); }
      }
      for (int c = 0; c < 2; ++c) { V f = ld(sign + k + 16 * c) * scale;
        for (int q = 0; q < 8; ++q) { float* to = out + (t + q) * ldg + k + 16 * c; st(to, add ? fma_(s[q][c], f, ld(to)) : s[q][c] * f); } }
    }
}
static void gradient(const float* w, const float* x, int64_t ldx, float* out, int64_t n, const float* sign, float scale) {
  for (int64_t i = 0; i < n; i += 8)
    for (int64_t k = 0; k < n; k += 32) {
      V s[8][2] = {};
      for (int64_t t = 0; t < 16; ++t) {
        V b[2]; for (int c = 0; c < 2; ++c) b[c] = ld(x + t * ldx + k + 16 * c);
        for (int q = 0; q < 8; ++q) { V a = all(w[t * n + i + q]); for (int c = 0; c < 2; ++c) s[q][c] = fma_(a, b[c], s[q][c]); }
      }
      for (int c = 0; c < 2; ++c) { V f = ld(sign + k + 16 * c) * scale; for (int q = 0; q < 8; ++q) st(out + (i + q) * ldx + k + 16 * c, s[q][c] * f); }
    }
}
static void transpose16(const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int a = 0; a < 16; ++a) for (int b = 0; b < 16; ++b) to[b * ldt + a] = from[a * ldf + b];
}
static void inner(const float* x, int64_t ldx, const float* g, int64_t ldg, float* z, int64_t n, const float* sign, bool more) {
  alignas(64) float panel[256 * 16], zT[256 * 16];
  for (int64_t k = 0; k < n; k += 16) transpose16(x + k, ldx, panel + k * 16, 16);
  for (int64_t k = 0; k < n; ++k) st(panel + k * 16, ld(panel + k * 16) * sign[k]);
  for (int64_t i = 0; i < n; i += 8) {
    if (more) for (int q = 0; q < 8; ++q) for (int64_t k = 0; k < n; k += 16) _mm_prefetch((const char*)(g + (i + q) * ldg + n + k), _MM_HINT_T0);
    V s[8] = {};
    for (int64_t k = 0; k < n; ++k) { V a = ld(panel + k * 16); for (int q = 0; q < 8; ++q) s[q] = fma_(all(g[(i + q) * ldg + k]), a, s[q]); }
    for (int q = 0; q < 8; ++q) st(zT + (i + q) * 16, s[q]);
  }
  for (int64_t i = 0; i < n; i += 16) transpose16(zT + i * 16, 16, z + i, n);
}
}  // namespace few
#pragma GCC pop_options
struct Stages {
  double of[2][16] = {}; long n[2] = {};
  ~Stages() { if (getenv("STAGES")) for (int b = 0; b < 2; ++b) { fprintf(stderr, b ? "bwd" : "fwd");
    static const char* names[] = {"check","base","ctor","inner","mix_up","mix_down","outer_mm","outer_add","gradient","diagonals","rest"};
    double all = 0; for (int i = 0; i < 11; ++i) { fprintf(stderr, " %s %.1f", names[i], of[b][i] / n[b] / 1e3); all += of[b][i] / n[b] / 1e3;}
    fprintf(stderr, " all %.1f calls %ld\n", all, n[b]); } }
};
Stages stages; int now_b = 0; double last_t = 0;
double clock_ns() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec * 1e9 + t.tv_nsec; }
void begin_stages(int b) { now_b = b; ++stages.n[b]; last_t = clock_ns(); }
void stage(int i) { const double t = clock_ns(); stages.of[now_b][i] += t - last_t; last_t = t; }

// lam, gam, s and row may be those of several experts, each with another dimension in front.
struct HadamardBasis {
  HadamardSizes sizes;
  const Tensor &lam, &gam, &s, &row, &col;
  bool expand;
  double scale;

  int64_t in() const { return expand ? sizes.d : sizes.D; }
  int64_t out() const { return expand ? sizes.D : sizes.d; }
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

HadamardSizes check_basis(const Tensor& lam, const Tensor& gam, const Tensor& s, const Tensor& row,
                          const Tensor& col) {
  check_diagonals(lam, gam);
  const int64_t r = lam.size(0), n = lam.size(1);
  const auto check_signs = [&](const Tensor& t, const char* name, const char* size) {
    RANDLORA_CHECK(
        t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.is_contiguous() && t.numel() > 0,
        name, " must be a contiguous float32 tensor (", size, "), got ", describe(t));
    check_same_device(t, name, lam, "lam");
  };
  check_signs(s, "s", "d");
  check_signs(row, "row", "D");
  check_signs(col, "col", "K");
  RANDLORA_CHECK(s.numel() == gam.size(1), "s must have d = ", gam.size(1), " numbers for gam ",
                 describe(gam), ", got ", describe(s));
  RANDLORA_CHECK(col.numel() == r * n, "col must have K = r * n = ", r * n, " numbers for lam ",
                 describe(lam), ", got ", describe(col));
  return {row.numel(), s.numel(), r, n};
}

// Checks what all experts share, and the first of them as a layer.
HadamardSizes check_experts(const Tensor& lam, const Tensor& gam, const Tensor& s,
                            const Tensor& row, const Tensor& col) {
  if (lam.dim() != 3) return check_basis(lam, gam, s, row, col);
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
  return check_basis(first(lam), first(gam), first_signs(s, "s", "d"), first_signs(row, "row", "D"),
                     col);
}

// Throws unless `t` is (out, in), for each expert.
void check_weights(const Tensor& t, const char* name, const HadamardBasis& b) {
  if (b.lam.dim() != 3) return check_weight(t, name, b.out(), b.in(), b.lam);
  RANDLORA_CHECK(t.dim() == 3 && t.size(0) == b.lam.size(0), name,
                 " must be (experts, out, in) = (", b.lam.size(0), ", ", b.out(), ", ", b.in(),
                 "), got ", describe(t));
  check_weight(torch::stable::select(t, 0, 0), name, b.out(), b.in(), b.lam);
}

// Where not, plain torch computes (randlora_ext/ops/hadamard.py).
bool fits(const HadamardBasis& b, const Tensor& x) {
  if (!runs_on_cuda(x)) return true;
  return has_kernels(x) && hadamard_fits(b.sizes, activation_dtype(x, "x"), card_of(x));
}

// One call, which takes chunks of tokens one after the other. x and y have d features in inner,
// outer and gradient, D in mix_up and mix_down; `t` is the chunk's first token.
class Product {
 public:
  Product(const HadamardBasis& b, const Tensor& like, int64_t T)
      : b_(b),
        s_(b.sizes),
        like_(like),
        dtype_(activation_dtype(like, "x")),
        class_dtype_(class_dtype(dtype_)),
        T_(T) {
    const Tensor lam = compute_copy(b.lam, dtype_);
    gam_ = compute_copy(b.gam, dtype_);
    if (!signs_in_x()) signed_gam_ = Temporary(s_.n * s_.d, class_dtype_, like);
    factors_ = Temporary(s_.factors(), compute_dtype(dtype_), like);
    run(like, HadamardGamma{s_, gam_->const_data_ptr(), floats(b.s),
                            signs_in_x() ? nullptr : signed_gam_.data(), lam.const_data_ptr(), floats(b.col), factors_.data(),
                            dtype_});
    const int64_t bytes = s_.classes() * s_.n * bytes_of(class_dtype_);
    const int64_t limit = (in_caches() ? int64_t{1} : int64_t{64}) << 20;
    int64_t most = std::max(limit / bytes, kFewest);
    if (in_spans()) most = std::min(most, kSpan);
    chunks_ = (T + most - 1) / most;
    // Rows of z that one token reads should not all fall into the same sets of a cache.
    if (in_caches() && T >= kFewest)
      while (chunks_ < T && (T + chunks_ - 1) / chunks_ % 16 == 0) ++chunks_;
    largest_ = chunks_ ? (T + chunks_ - 1) / chunks_ : 0;
    slots_ =
        runs_on_cuda(like) ? slots_on_card(largest_) : std::min<int64_t>((largest_ + 15) / 16, 64);
    if (signs_in_x() || dtype_ != class_dtype_)
      of_classes_ = Temporary(largest_ * s_.d, class_dtype_, like);
  }

  // to (+)= the product of `from` with dW: `up` from d features to D, or down. With `other`, which
  // is like `to`, `diagonals` may follow. Linear (core/operators.h) has the same operands.
  void compute(bool up, const Tensor& from, const OptionalTensor& to, bool accumulate,
               const Tensor* other = nullptr) {
    if (other) reserve_gradients();
    const Temporary z = for_classes(), w = up && !other ? Temporary() : for_classes();
    const Tensor *small = up ? &from : other, *large = up ? other : &from;
    for (chunk_ = 0; chunk_ < chunks_; ++chunk_) {
      const int64_t t = chunk_ * T_ / chunks_;
      tokens_ = (chunk_ + 1) * T_ / chunks_ - t;
      stage(10);
      if (up || other) inner(*small, t, z), stage(3);
      if (up && to) mix_up(z, *to, t, accumulate), stage(4);
      if (!up || other) mix_down(*large, t, w, other ? &z : nullptr), stage(5);
      if (!up && to) outer(w, *to, t, accumulate, z), stage(7);
      if (other) gradient(w, *small, t), stage(8);
    }
  }
  std::tuple<Tensor, Tensor> diagonals() const {
    const ScalarType type = scalar_type(compute_dtype(dtype_));
    Tensor dlam = allocate({s_.r, s_.n}, type, like_);
    if (is_few()) {
    run(like_, HadamardDiagonals{s_, nullptr, sums_.data(), chunks_ * slots_,
                                 nullptr, floats(b_.col), dlam.mutable_data_ptr(), nullptr,
                                 dtype_, b_.scale});
      return {dlam, *dgam_};
    }
    Tensor dgam = allocate({s_.n, s_.d}, type, like_);
    class_dtype_ == DType::f64 ? sum_spans<double>() : sum_spans<float>();
    run(like_, HadamardDiagonals{s_, P_.data(), sums_.data(), chunks_ * slots_,
                                 signs_in_x() ? nullptr : floats(b_.s), floats(b_.col), dlam.mutable_data_ptr(), dgam.mutable_data_ptr(),
                                 dtype_, b_.scale});
    return {cast(dlam, b_.lam.scalar_type()), cast(dgam, b_.gam.scalar_type())};
  }

 private:
  // At most 512, all of which run at once, and not more than give the longest slot as few tokens:
  // each writes K sums.
  static int64_t slots_on_card(int64_t tokens) {
    const int64_t longest = std::max<int64_t>((tokens + 511) / 512, 1);
    return (tokens + longest - 1) / longest;
  }
  // (classes, tokens, n), with room for a vector behind it.
  Temporary for_classes() const {
    return Temporary(s_.classes() * largest_ * s_.n + 64, class_dtype_, like_);
  }
  void reserve_gradients() {
    if (in_spans()) spans_ = std::min((T_ + kSpan - 1) / kSpan, chunks_);
    const int64_t numbers = std::max<int64_t>(spans_, 1) * s_.classes() * s_.n * s_.n;
    P_ = Temporary(numbers, class_dtype_, like_);
    sums_ = Temporary(chunks_ * slots_ * s_.K(), compute_dtype(dtype_), like_);
    if (T_ == 0) {
      Tensor P = MatrixBatch{&P_.tensor(), class_dtype_, 0, 1, 1, numbers, 0, numbers, 1}.tensor();
      torch::stable::zero_(P);
    }
  }

  // z = the class products with x (T, d).
  bool is_few() const { return getenv("FEW") && T_ == 16 && s_.n % 32 == 0 && s_.d % s_.n == 0 && dtype_ == DType::f32; }
  void inner(const Tensor& x, int64_t t, const Temporary& z) {
    if (is_few()) {
      for (int64_t m = 0; m < s_.classes(); ++m)
        few::inner((const float*)x.const_data_ptr() + m * s_.n, s_.d, (const float*)gam_->const_data_ptr() + m * s_.n, s_.d, (float*)z.data() + m * 16 * s_.n, s_.n, floats(b_.s) + m * s_.n, m + 1 < s_.classes());
      return;
    }
    const MatrixBatch from = for_products(x, t);
    each_part([&](const Part& p) {
      multiply(at_classes(z, p), columns(from, p), gamma(p).transposed(), 1, 0);
    });
  }
  // Adds the class products with w to y (T, d), or sets y unless `accumulate`. `room` is scratch.
  void outer(const Temporary& w, const Tensor& y, int64_t t, bool accumulate,
             const Temporary& room) const {
    if (is_few()) {
      for (int64_t m = 0; m < s_.classes(); ++m)
        few::outer((float*)w.data() + m * 16 * s_.n, (const float*)gam_->const_data_ptr() + m * s_.n, s_.d, (float*)y.mutable_data_ptr() + m * s_.n, s_.n, floats(b_.s) + m * s_.n, b_.scale, accumulate);
      return;
    }
    if (in_caches()) {
      each_part([&](const Part& p) {
        MatrixBatch out = at_classes(room, p);
        out.cols = p.width;
        multiply(out, at_classes(w, p), gamma(p), 1, 0);
      });
      stage(6);
      TorchRuntime runtime;
      void* to = moved(y.mutable_data_ptr(), t * s_.d, dtype_);
      cpu_kernels().hadamard_add(
          {s_, room.data(), floats(b_.s), to, dtype_, tokens_, b_.scale, accumulate}, runtime);
      return;
    }
    // torch's GEMM adds to results of its own dtype alone.
    const bool direct = dtype_ == class_dtype_;
    const MatrixBatch to = chunk_of(y, t, dtype_),
                      sums = direct ? to : chunk_of(room.tensor(), 0, class_dtype_);
    if (!direct && accumulate) copy(sums, to);
    each_part([&](const Part& p) {
      multiply(columns(sums, p), at_classes(w, p), gamma(p), b_.scale, accumulate);
    });
    if (!direct) copy(to, sums);
  }
  // The gradient of gamma from w and x (T, d), added to that of the chunks before in its span.
  void gradient(const Temporary& w, const Tensor& x, int64_t t) {
    if (is_few()) {
      dgam_ = allocate({s_.n, s_.d}, ScalarType::Float, like_);
      for (int64_t m = 0; m < s_.classes(); ++m)
        few::gradient((float*)w.data() + m * 16 * s_.n, (const float*)x.const_data_ptr() + m * s_.n, s_.d, (float*)dgam_->mutable_data_ptr() + m * s_.n, s_.n, floats(b_.s) + m * s_.n, b_.scale);
      return;
    }
    const auto span_of = [&](int64_t chunk) { return chunk * spans_ / chunks_; };
    const int64_t span = span_of(chunk_), first_class = span * s_.classes();
    const bool add = chunk_ > 0 && span_of(chunk_ - 1) == span;
    const MatrixBatch from = for_products(x, t);
    each_part([&](const Part& p) {
      const int64_t each = s_.n * s_.n;
      multiply(batch(P_, (first_class + p.first) * each, p.count, s_.n, p.width, each, s_.n),
               at_classes(w, p).transposed(), columns(from, p), 1, add);
    });
  }
  // Adds to y (T, D) what z gives by mix and transform, or sets y unless `accumulate`.
  void mix_up(const Temporary& z, const Tensor& y, int64_t t, bool accumulate) const {
    run(like_, HadamardUp{s_, z.data(), factors_.data(), floats(b_.row),
                          moved(y.mutable_data_ptr(), t * s_.D, dtype_), dtype_, tokens_, b_.scale,
                          accumulate});
  }
  // w from y (T, D); with z, also the sums for the gradient of lambda.
  void mix_down(const Tensor& y, int64_t t, const Temporary& w, const Temporary* z) const {
    void* sums = z ? moved(sums_.data(), chunk_ * slots_ * s_.K(), compute_dtype(dtype_)) : nullptr;
    run(like_, HadamardDown{s_, moved(y.const_data_ptr(), t * s_.D, dtype_), factors_.data(),
                            floats(b_.row), w.data(), z ? z->data() : nullptr, sums, slots_, dtype_,
                            tokens_});
  }

  // Neighboring classes with equally many columns: the whole ones, or the last that d does not
  // fill.
  struct Part {
    int64_t first, count, width;  // classes; columns of each
  };
  template <class F>
  void each_part(const F& fn) const {
    const int64_t whole = s_.d / s_.n, rest = s_.d % s_.n;
    if (whole > 0) fn(Part{0, whole, s_.n});
    if (rest > 0) fn(Part{whole, 1, rest});
  }

  MatrixBatch batch(const Temporary& in, int64_t first, int64_t count, int64_t rows, int64_t cols,
                    int64_t next, int64_t row) const {
    return {&in.tensor(), class_dtype_, first, count, rows, cols, next, row, 1};
  }
  MatrixBatch at_classes(const Temporary& z, const Part& p) const {
    const int64_t each = tokens_ * s_.n;
    return batch(z, p.first * each, p.count, tokens_, s_.n, each, s_.n);
  }
  MatrixBatch gamma(const Part& p) const {
    const Tensor& in = signs_in_x() ? *gam_ : signed_gam_.tensor();
    return {&in, class_dtype_, p.first * s_.n, p.count, s_.n, p.width, s_.n, s_.d, 1};
  }
  // (tokens, d), from token t on.
  MatrixBatch chunk_of(const Tensor& x, int64_t t, DType dtype) const {
    return {&x, dtype, t * s_.d, 1, tokens_, s_.d, 0, s_.d, 1};
  }
  // Of a chunk, those of its classes.
  MatrixBatch columns(const MatrixBatch& chunk, const Part& p) const {
    return {chunk.in, chunk.dtype, chunk.first + p.first * s_.n,
            p.count,  tokens_,     p.width,
            s_.n,     s_.d,        1};
  }
  static void copy(const MatrixBatch& to, const MatrixBatch& from) {
    Tensor result = to.tensor();
    torch::stable::copy_(result, from.tensor());
  }
  // The chunk of x (T, d) in the class dtype, with the signs if gamma has them not. A call has one
  // such x.
  MatrixBatch for_products(const Tensor& x, int64_t t) {
    const MatrixBatch from = chunk_of(x, t, dtype_);
    if (!signs_in_x() && dtype_ == class_dtype_) return from;
    const MatrixBatch to = chunk_of(of_classes_.tensor(), 0, class_dtype_);
    if (made_for_ == chunk_) return to;
    made_for_ = chunk_;
    if (!signs_in_x()) {
      copy(to, from);
      return to;
    }
    TorchRuntime runtime;
    cpu_kernels().hadamard_signed({s_, moved(x.const_data_ptr(), t * s_.d, dtype_), floats(b_.s),
                                   of_classes_.data(), dtype_, tokens_},
                                  runtime);
    return to;
  }
  template <class C>
  void sum_spans() const {
    if (spans_ == 1) return;
    const int64_t size = s_.classes() * s_.n * s_.n;
    C* P = static_cast<C*>(P_.data());
    for (int64_t e = size; e < spans_ * size; ++e) P[e % size] += P[e];
  }

  // Whether z and w of one chunk should stay in the caches. In bf16 each chunk rounds the gradient
  // of gamma, and on a GPU each costs launches: there only memory limits a chunk.
  bool in_caches() const { return !runs_on_cuda(like_) && bytes_of(class_dtype_) > 2; }
  // Whether x gets the signs s, and not gamma: of few tokens it has fewer numbers, and those of gamma
  // come from memory, because the base layer's weight has driven them out of the caches. Needs a
  // class dtype in which gamma is there.
  bool signs_in_x() const { return in_caches(); }
  // Whether the gradient of gamma is summed in spans of about kSpan tokens, added at the end. On
  // AMD's processors MKL computes products of at most 128 elements (here n x n) token by token, and
  // their error grows with the root of the number of tokens.
  bool in_spans() const { return in_caches() && s_.n <= 11; }
  static constexpr int64_t kFewest = 64, kSpan = 512;

  const HadamardBasis& b_;
  const HadamardSizes& s_;
  const Tensor& like_;
  DType dtype_, class_dtype_;
  OptionalTensor dgam_; OptionalTensor gam_;  // (n, d) in the compute type
  Temporary signed_gam_, factors_, P_, sums_, of_classes_;
  int64_t T_, chunks_, largest_, slots_, spans_ = 1, chunk_ = 0, tokens_ = 0, made_for_ = -1;
};

bool base_comes_last(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return weight && !bias && (runs_on_cuda(x) || getenv("BASE_LAST"));
}
MatrixBatch matrix(const Tensor& weight) {
  return {&weight,
          activation_dtype(weight, "weight"),
          0,
          1,
          weight.size(0),
          weight.size(1),
          0,
          weight.stride(0),
          weight.stride(1)};
}
// to += from @ right. `to` and `from` are contiguous and have T tokens.
void add_product(const Tensor& to, const Tensor& from, const MatrixBatch& right, int64_t T) {
  const auto tokens = [&](const Tensor& t) {
    const int64_t features = t.size(-1);
    return MatrixBatch{&t, right.dtype, 0, 1, T, features, 0, features, 1};
  };
  if (runs_on_cuda(to)) multiply(tokens(to), tokens(from), right, 1, 1);
  else multiply_whole(tokens(to), tokens(from), right, 1, 1);
  stage(1);
}

Tensor hadamard_linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam, Tensor gam,
                       Tensor s, Tensor row, Tensor col, bool expand, double scale) {
  begin_stages(0);
  const HadamardBasis b{check_basis(lam, gam, s, row, col), lam, gam, s, row, col, expand, scale};
  const int64_t T = check_linear(x, weight, bias, lam, b.in(), b.out());
  if (!fits(b, x))
    return std::get<0>(call_torch<Tensor>("randlora::hadamard_linear_plain", x, weight, bias, lam,
                                          gam, s, row, col, expand, scale));
  stage(0);
  const bool last = base_comes_last(x, weight, bias);
  const OptionalTensor first = last ? OptionalTensor() : weight;
  const Tensor xc = as_contiguous(x), y = base_output(xc, first, bias, b.out());
  stage(1);
  Product pr(b, xc, T); stage(2); pr.compute(expand, xc, y, first.has_value());
  if (last) add_product(y, xc, matrix(*weight).transposed(), T);
  return y;
}

Gradients hadamard_linear_backward(Tensor dy, Tensor x, OptionalTensor weight, Tensor lam,
                                   Tensor gam, Tensor s, Tensor row, Tensor col, bool expand,
                                   double scale, bool need_x, bool need_diagonals) {
  begin_stages(1);
  const HadamardBasis b{check_basis(lam, gam, s, row, col), lam, gam, s, row, col, expand, scale};
  const int64_t T = check_linear(x, weight, {}, lam, b.in(), b.out());
  check_output_gradient(dy, x, b.out());
  if (!need_x && !need_diagonals) return {};
  if (!fits(b, x))
    return call_torch<OptionalTensor, OptionalTensor, OptionalTensor>(
        "randlora::hadamard_linear_backward_plain", dy, x, weight, lam, gam, s, row, col, expand,
        scale, need_x, need_diagonals);
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  stage(0);
  const bool last = need_x && base_comes_last(x, weight, {});
  const OptionalTensor first = last ? OptionalTensor() : weight;
  OptionalTensor dx, dlam, dgam;
  if (need_x) dx = base_gradient(dyc, first, xc);
  stage(1);
  Product product(b, xc, T); stage(2);
  product.compute(!expand, dyc, dx, first.has_value(), need_diagonals ? &xc : nullptr);
  if (last) add_product(*dx, dyc, matrix(*weight), T);
  stage(10);
  if (need_diagonals) std::tie(dlam, dgam) = product.diagonals();
  stage(9);
  return {dx, dlam, dgam};
}

// `lam` and `gam` are contiguous copies in the compute type.
HadamardExperts experts_of(const HadamardBasis& b, const Tensor& lam, const Tensor& gam,
                           const OptionalTensor& weight, DType dtype) {
  const HadamardSizes& sizes = b.sizes;
  const int64_t count = lam.dim() == 3 ? lam.size(0) : 1;
  const int64_t next_s = b.s.dim() == 2 ? sizes.d : 0, next_row = b.row.dim() == 2 ? sizes.D : 0;
  const void *l = lam.const_data_ptr(), *g = gam.const_data_ptr();
  const void* W = weight ? weight->const_data_ptr() : nullptr;
  return {sizes,  count,    l, g,     floats(b.s), floats(b.row), floats(b.col),
          next_s, next_row, W, dtype, b.scale,     !b.expand};
}

// W + dW, or dW without a weight.
Tensor hadamard_weight(OptionalTensor weight, Tensor lam, Tensor gam, Tensor s, Tensor row,
                       Tensor col, bool expand, double scale) {
  const HadamardBasis b{check_experts(lam, gam, s, row, col), lam, gam, s, row, col, expand, scale};
  const DType dtype = activation_dtype(weight ? *weight : lam, weight ? "weight" : "lam");
  if (weight) check_weights(*weight, "weight", b);
  if (!has_kernels(lam))
    return std::get<0>(call_torch<Tensor>("randlora::hadamard_weight_plain", weight, lam, gam, s,
                                          row, col, expand, scale));
  std::vector<int64_t> shape{b.out(), b.in()};
  if (lam.dim() == 3) shape.insert(shape.begin(), lam.size(0));
  const Tensor out = allocate(shape, scalar_type(dtype), lam);
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  if (weight) weight = as_contiguous(*weight);
  run(lam, HadamardWeight{experts_of(b, l, g, weight, dtype), out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> hadamard_weight_backward(Tensor grad, Tensor lam, Tensor gam, Tensor s,
                                                    Tensor row, Tensor col, bool expand,
                                                    double scale) {
  const HadamardBasis b{check_experts(lam, gam, s, row, col), lam, gam, s, row, col, expand, scale};
  const DType dtype = activation_dtype(grad, "grad");
  check_weights(grad, "grad", b);
  if (!fits(b, grad))
    return call_torch<Tensor, Tensor>("randlora::hadamard_weight_backward_plain", grad, lam, gam, s,
                                      row, col, expand, scale);
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  const Tensor dlam = allocate_like(l), dgam = allocate_like(g);
  run(lam, HadamardWeightBackward{experts_of(b, l, g, as_contiguous(grad), dtype),
                                  dlam.mutable_data_ptr(), dgam.mutable_data_ptr()});
  return {cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

#define RANDLORA_BASIS \
  "Tensor lam, Tensor gam, Tensor s, Tensor row, Tensor col, bool expand, float scale"
const Operators operators{
    {"hadamard_linear(Tensor x, Tensor? weight, Tensor? bias, " RANDLORA_BASIS ") -> Tensor",
     RANDLORA_BOX(hadamard_linear)},
    {"hadamard_linear_backward(Tensor dy, Tensor x, Tensor? weight, " RANDLORA_BASIS
     ", bool need_x, bool need_diagonals) -> (Tensor?, Tensor?, Tensor?)",
     RANDLORA_BOX(hadamard_linear_backward)},
    {"hadamard_weight(Tensor? weight, " RANDLORA_BASIS ") -> Tensor",
     RANDLORA_BOX(hadamard_weight)},
    {"hadamard_weight_backward(Tensor grad, " RANDLORA_BASIS ") -> (Tensor, Tensor)",
     RANDLORA_BOX(hadamard_weight_backward)},
};

}  // namespace
}  // namespace randlora
