// torch.ops.randlora.independent_*: a linear layer with an adapter on independent bases.
//
//   y = x W^T + bias + x dW^T,   dW = scale * B (lambda * A * gamma), transposed unless `expand`
//
// Both sides of the basis are applied to x; dW never exists. Without a weight the result is only
// the adapter's part, for base layers of any kind.
#include "linear.h"

namespace randlora {
namespace {

// Positions in a run ascend, so checking the last one bounds them all. For an empty run this reads
// the position before it, which is harmless and keeps the loop free of branches.
void check_last(const AnyLists& any, int64_t lines, int64_t limit, const char* name,
                const char* limit_name) {
  if (any.count == 0) return;
  const int64_t largest = any.typed([&](const auto& lists) {
    int64_t most = 0;
    for (int64_t run = 1; run <= 2 * lines; ++run) {
      const int64_t last = lists.offset[run] > 0 ? lists.offset[run] - 1 : 0;
      most = lists.index[last] > most ? lists.index[last] : most;
    }
    return most;
  });
  RANDLORA_CHECK(largest < limit, name, "_index has a position ", largest, ", but ", limit_name,
                 " = ", limit, "; these tensors are of another layer");
}

// Every run of positions of A must ascend: all steps that do not ascend lie between two runs.
void check_ascending(const AnyLists& any, int64_t lines) {
  const bool ascend = any.typed([&](const auto& lists) {
    const auto* position = lists.index;
    int64_t falls = 0, between = 0;
    for (int64_t p = 1; p < any.count; ++p) falls += position[p] <= position[p - 1];
    for (int64_t run = 1; run < 2 * lines; ++run) {
      const int64_t p = lists.offset[run];
      if (p > lists.offset[run - 1] && p < any.count) between += position[p] <= position[p - 1];
    }
    return falls == between;
  });
  RANDLORA_CHECK(ascend,
                 "the positions of a_index must ascend from each entry of a_offset to the next");
}

// The tensors that describe the bases.
struct Packed {
  const Tensor &lam, &gam, &a_offset, &a_index;
  const OptionalTensor &a_tables, &b_planes, &b_row_offset, &b_row_index, &b_col_offset,
      &b_col_index;

  // Throws if anything disagrees. r and n are lam's, d is gam's, and D follows from B.
  Basis checked() const {
    check_diagonals(lam, gam);
    Basis b;
    b.r = lam.size(0), b.n = lam.size(1), b.d = gam.size(1);
    b.a = lists("a", a_offset, a_index, b.r, b.d, "d");
    if (lam.is_cpu()) check_ascending(b.a, b.r);
    const int given = b_row_offset.has_value() + b_row_index.has_value() +
                      b_col_offset.has_value() + b_col_index.has_value();
    RANDLORA_CHECK(given == (b_planes ? 0 : 4),
                   "B must be given either as b_planes or as b_row_offset, b_row_index, "
                   "b_col_offset and b_col_index, got ",
                   b_planes ? "b_planes and " : "", given, " of the other four");
    if (b_planes) {
      planes(b);
    } else {
      b.D = (b_row_offset->numel() - 1) / 2;
      RANDLORA_CHECK(b.D > 0, "b_row_offset must have 2 * D + 1 entries, got ",
                     describe(*b_row_offset));
      b.b_rows = lists("b_row", *b_row_offset, *b_row_index, b.D, b.K(), "K");
      b.b_cols = lists("b_col", *b_col_offset, *b_col_index, b.K(), b.D, "D");
    }
    RANDLORA_CHECK(b.a.wide || (b.D <= 65536 && b.d <= 65536 && b.K() <= 65536),
                   "int16 positions end at 65535, but D = ", b.D, ", d = ", b.d,
                   " and K = ", b.K());
    if (a_tables) b.a_tables = tables(b);
    return b;
  }

 private:
  AnyLists lists(const char* name, const Tensor& offset, const Tensor& index, int64_t lines,
                 int64_t limit, const char* limit_name) const {
    check_same_device(offset, name, lam, "lam");
    const AnyLists found = check_lists(offset, index, lines, std::string(name) + "_");
    RANDLORA_CHECK(index.scalar_type() == a_index.scalar_type(), name,
                   "_index must have the dtype of a_index, got ", describe(index), " and ",
                   describe(a_index));
    if (lam.is_cpu()) check_last(found, lines, limit, name, limit_name);
    return found;
  }

  void planes(Basis& b) const {
    RANDLORA_CHECK(b.n <= 65536, "bit planes serve up to n = 65536 bases, got n = ", b.n);
    const Tensor& t = *b_planes;
    const int64_t words = words_of(b.K());
    check_same_device(t, "b_planes", lam, "lam");
    RANDLORA_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == 3 &&
                       t.size(0) == 2 && t.size(1) > 0 && t.size(2) == words,
                   "b_planes must be a contiguous int64 tensor (2, D, ceil(K / 64)) = (2, D, ",
                   words, "), got ", describe(t));
    b.D = t.size(1);
    const auto* plus = static_cast<const uint64_t*>(t.const_data_ptr());
    b.b_planes = {plus, plus + b.D * words, words};
  }

  const int32_t* tables(const Basis& b) const {
    const int64_t numbers = support_numbers(b.a.count, b.r, b.d);
    check_same_device(*a_tables, "a_tables", lam, "lam");
    RANDLORA_CHECK(a_tables->scalar_type() == ScalarType::Int && a_tables->dim() == 1 &&
                       a_tables->is_contiguous() && a_tables->size(0) == numbers,
                   "a_tables must be an int32 tensor of ", numbers, " numbers, got ",
                   describe(*a_tables));
    return a_tables->const_data_ptr<int32_t>();
  }
};

Tensor independent_linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam,
                          Tensor gam, Tensor a_offset, Tensor a_index, OptionalTensor a_tables,
                          OptionalTensor b_planes, OptionalTensor b_row_offset,
                          OptionalTensor b_row_index, OptionalTensor b_col_offset,
                          OptionalTensor b_col_index, bool expand, double scale) {
  const Basis b = Packed{lam,      gam,          a_offset,    a_index,      a_tables,
                         b_planes, b_row_offset, b_row_index, b_col_offset, b_col_index}
                      .checked();
  const int64_t in = expand ? b.d : b.D, out = expand ? b.D : b.d;
  const int64_t T = check_linear(x, weight, bias, lam, in, out);
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), y = base_output(xc, weight, bias, out);
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  run(x, Linear{b, l.const_data_ptr(), g.const_data_ptr(), xc.const_data_ptr(),
                y.mutable_data_ptr(), dtype, T, scale, expand, weight.has_value()});
  return y;
}

Gradients independent_linear_backward(Tensor dy, Tensor x, OptionalTensor weight, Tensor lam,
                                      Tensor gam, Tensor a_offset, Tensor a_index,
                                      OptionalTensor a_tables, OptionalTensor b_planes,
                                      OptionalTensor b_row_offset, OptionalTensor b_row_index,
                                      OptionalTensor b_col_offset, OptionalTensor b_col_index,
                                      bool expand, double scale, bool need_x, bool need_diagonals) {
  const Basis b = Packed{lam,      gam,          a_offset,    a_index,      a_tables,
                         b_planes, b_row_offset, b_row_index, b_col_offset, b_col_index}
                      .checked();
  const int64_t in = expand ? b.d : b.D, out = expand ? b.D : b.d;
  const int64_t T = check_linear(x, weight, {}, lam, in, out);
  check_output_gradient(dy, x, out);
  if (!need_x && !need_diagonals) return {};
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  const Tensor l = compute_copy(lam, dtype), g = compute_copy(gam, dtype);
  OptionalTensor dx, dlam, dgam;
  if (need_x) dx = base_gradient(dyc, weight, xc);
  if (need_diagonals) dlam = allocate_like(l), dgam = allocate_like(g);
  run(x, Linear{b, l.const_data_ptr(), g.const_data_ptr(), dyc.const_data_ptr(),
                dx ? dx->mutable_data_ptr() : nullptr, dtype, T, scale, !expand, weight.has_value(),
                xc.const_data_ptr(), dlam ? dlam->mutable_data_ptr() : nullptr,
                dgam ? dgam->mutable_data_ptr() : nullptr});
  if (need_diagonals) dlam = cast(*dlam, lam.scalar_type()), dgam = cast(*dgam, gam.scalar_type());
  return {dx, dlam, dgam};
}

#define RANDLORA_BASIS                                                                  \
  "Tensor lam, Tensor gam, Tensor a_offset, Tensor a_index, Tensor? a_tables, "         \
  "Tensor? b_planes, Tensor? b_row_offset, Tensor? b_row_index, Tensor? b_col_offset, " \
  "Tensor? b_col_index, bool expand, float scale"
const Operators operators{
    {"independent_linear(Tensor x, Tensor? weight, Tensor? bias, " RANDLORA_BASIS ") -> Tensor",
     RANDLORA_BOX(independent_linear)},
    {"independent_linear_backward(Tensor dy, Tensor x, Tensor? weight, " RANDLORA_BASIS
     ", bool need_x, bool need_diagonals) -> (Tensor?, Tensor?, Tensor?)",
     RANDLORA_BOX(independent_linear_backward)},
};

}  // namespace
}  // namespace randlora
