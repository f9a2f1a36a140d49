// torch.ops.randlora.independent_*: a linear layer with an adapter on ternary bases,
// independent or imported.
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

// Lists whose positions are below `limit`, of the dtype of a_index.
AnyLists checked_lists(const char* name, const Tensor& offset, const Tensor& index, int64_t lines,
                       int64_t limit, const char* limit_name, const Tensor& a_index,
                       const Tensor& lam) {
  check_same_device(offset, name, lam, "lam");
  const AnyLists lists = check_lists(offset, index, lines, std::string(name) + "_");
  RANDLORA_CHECK(index.scalar_type() == a_index.scalar_type(), name,
                 "_index must have the dtype of a_index, got ", describe(index), " and ",
                 describe(a_index));
  if (lam.is_cpu()) check_last(lists, lines, limit, name, limit_name);
  return lists;
}

// Sets b.b_planes, and b.D, which follows from them.
void set_planes(TernaryBases& b, const Tensor& planes, const Tensor& lam) {
  RANDLORA_CHECK(b.n <= 65536, "bit planes serve up to n = 65536 copies, got n = ", b.n);
  const int64_t words = words_of(b.K());
  check_same_device(planes, "b_planes", lam, "lam");
  RANDLORA_CHECK(planes.scalar_type() == ScalarType::Long && planes.is_contiguous() &&
                     planes.dim() == 3 && planes.size(0) == 2 && planes.size(1) > 0 &&
                     planes.size(2) == words,
                 "b_planes must be a contiguous int64 tensor (2, D, ceil(K / 64)) = (2, D, ", words,
                 "), got ", describe(planes));
  b.D = planes.size(1);
  b.b_planes = view_planes(planes);
}

const int32_t* checked_tables(const TernaryBases& b, const Tensor& tables, const Tensor& lam) {
  const int64_t numbers = support_numbers(b.a.count, b.r, b.d);
  check_same_device(tables, "a_tables", lam, "lam");
  RANDLORA_CHECK(tables.scalar_type() == ScalarType::Int && tables.dim() == 1 &&
                     tables.is_contiguous() && tables.size(0) == numbers,
                 "a_tables must be an int32 tensor of ", numbers, " numbers, got ",
                 describe(tables));
  return tables.const_data_ptr<int32_t>();
}

// The bases from the tensors that describe them. Throws if anything disagrees. r and n are lam's, d
// is gam's, and D follows from B.
TernaryBases checked_basis(const Tensor& lam, const Tensor& gam, const Tensor& a_offset,
                           const Tensor& a_index, const OptionalTensor& a_tables,
                           const OptionalTensor& b_planes, const OptionalTensor& b_row_offset,
                           const OptionalTensor& b_row_index, const OptionalTensor& b_col_offset,
                           const OptionalTensor& b_col_index) {
  check_diagonals(lam, gam);
  TernaryBases b;
  b.r = lam.size(0);
  b.n = lam.size(1);
  b.d = gam.size(1);
  b.a = checked_lists("a", a_offset, a_index, b.r, b.d, "d", a_index, lam);
  if (lam.is_cpu()) check_ascending(b.a, b.r);
  const int given = b_row_offset.has_value() + b_row_index.has_value() + b_col_offset.has_value() +
                    b_col_index.has_value();
  RANDLORA_CHECK(given == (b_planes ? 0 : 4),
                 "B must be given either as b_planes or as b_row_offset, b_row_index, "
                 "b_col_offset and b_col_index, got ",
                 b_planes ? "b_planes and " : "", given, " of the other four");
  if (b_planes) {
    set_planes(b, *b_planes, lam);
  } else {
    b.D = (b_row_offset->numel() - 1) / 2;
    RANDLORA_CHECK(b.D > 0, "b_row_offset must have 2 * D + 1 entries, got ",
                   describe(*b_row_offset));
    b.b_rows = checked_lists("b_row", *b_row_offset, *b_row_index, b.D, b.K(), "K", a_index, lam);
    b.b_cols = checked_lists("b_col", *b_col_offset, *b_col_index, b.K(), b.D, "D", a_index, lam);
  }
  RANDLORA_CHECK(b.a.wide || (b.D <= 65536 && b.d <= 65536 && b.K() <= 65536),
                 "int16 positions end at 65535, but D = ", b.D, ", d = ", b.d, " and K = ", b.K());
  if (a_tables) b.a_tables = checked_tables(b, *a_tables, lam);
  return b;
}

Tensor independent_linear(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor lam,
                          Tensor gam, Tensor a_offset, Tensor a_index, OptionalTensor a_tables,
                          OptionalTensor b_planes, OptionalTensor b_row_offset,
                          OptionalTensor b_row_index, OptionalTensor b_col_offset,
                          OptionalTensor b_col_index, bool expand, double scale) {
  const TernaryBases basis = checked_basis(lam, gam, a_offset, a_index, a_tables, b_planes,
                                           b_row_offset, b_row_index, b_col_offset, b_col_index);
  const int64_t in = expand ? basis.d : basis.D, out = expand ? basis.D : basis.d;
  const int64_t T = check_linear(x, weight, bias, lam, in, out);
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), y = base_output(xc, weight, bias, out);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  IndependentLinear p{};
  p.basis = basis;
  p.lam = lam_copy.const_data_ptr();
  p.gam = gam_copy.const_data_ptr();
  p.from = xc.const_data_ptr();
  p.to = y.mutable_data_ptr();
  p.dtype = dtype;
  p.T = T;
  p.scale = scale;
  p.up = expand;
  p.accumulate = weight.has_value();
  run(x, p);
  return y;
}

Gradients independent_linear_backward(Tensor dy, Tensor x, OptionalTensor weight, Tensor lam,
                                      Tensor gam, Tensor a_offset, Tensor a_index,
                                      OptionalTensor a_tables, OptionalTensor b_planes,
                                      OptionalTensor b_row_offset, OptionalTensor b_row_index,
                                      OptionalTensor b_col_offset, OptionalTensor b_col_index,
                                      bool expand, double scale, bool need_dx,
                                      bool need_dlam_dgam) {
  const TernaryBases basis = checked_basis(lam, gam, a_offset, a_index, a_tables, b_planes,
                                           b_row_offset, b_row_index, b_col_offset, b_col_index);
  const int64_t in = expand ? basis.d : basis.D, out = expand ? basis.D : basis.d;
  const int64_t T = check_linear(x, weight, {}, lam, in, out);
  check_output_gradient(dy, x, out);
  if (!need_dx && !need_dlam_dgam) return {};
  const DType dtype = activation_dtype(x, "x");
  const Tensor xc = as_contiguous(x), dyc = as_contiguous(dy);
  const Tensor lam_copy = compute_copy(lam, dtype), gam_copy = compute_copy(gam, dtype);
  IndependentLinear p{};
  p.basis = basis;
  p.lam = lam_copy.const_data_ptr();
  p.gam = gam_copy.const_data_ptr();
  p.from = dyc.const_data_ptr();
  p.other = xc.const_data_ptr();
  p.dtype = dtype;
  p.T = T;
  p.scale = scale;
  p.up = !expand;
  p.accumulate = weight.has_value();
  OptionalTensor dx;
  if (need_dx) {
    dx = base_gradient(dyc, weight, xc);
    p.to = dx->mutable_data_ptr();
  }
  if (!need_dlam_dgam) {
    run(x, p);
    return {dx, {}, {}};
  }
  const Tensor dlam = allocate_like(lam_copy), dgam = allocate_like(gam_copy);
  p.dlam = dlam.mutable_data_ptr();
  p.dgam = dgam.mutable_data_ptr();
  run(x, p);
  return {dx, cast(dlam, lam.scalar_type()), cast(dgam, gam.scalar_type())};
}

#define RANDLORA_TERNARY_ADAPTER                                                        \
  "Tensor lam, Tensor gam, Tensor a_offset, Tensor a_index, Tensor? a_tables, "         \
  "Tensor? b_planes, Tensor? b_row_offset, Tensor? b_row_index, Tensor? b_col_offset, " \
  "Tensor? b_col_index, bool expand, float scale"
const Operators operators{
    {"independent_linear(Tensor x, Tensor? weight, Tensor? bias, " RANDLORA_TERNARY_ADAPTER
     ") -> Tensor",
     RANDLORA_BOX(independent_linear)},
    {"independent_linear_backward(Tensor dy, Tensor x, Tensor? weight, " RANDLORA_TERNARY_ADAPTER
     ", bool need_dx, bool need_dlam_dgam) -> (Tensor?, Tensor?, Tensor?)",
     RANDLORA_BOX(independent_linear_backward)},
};

}  // namespace
}  // namespace randlora
