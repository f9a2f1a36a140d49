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

// What both operators get of an adapter. B is given as planes or as lists by row and by column.
struct TernaryAdapter {
  Tensor lam, gam, a_offset, a_index;
  OptionalTensor a_tables, b_planes, b_row_offset, b_row_index, b_col_offset, b_col_index;
  bool expand;
  double scale;
};

#define RANDLORA_TERNARY_ADAPTER                                                        \
  "Tensor lam, Tensor gam, Tensor a_offset, Tensor a_index, Tensor? a_tables, "         \
  "Tensor? b_planes, Tensor? b_row_offset, Tensor? b_row_index, Tensor? b_col_offset, " \
  "Tensor? b_col_index, bool expand, float scale"
TernaryAdapter next_adapter(Arguments& given) {
  TernaryAdapter adapter{given.next<Tensor>(), given.next<Tensor>(), given.next<Tensor>(),
                         given.next<Tensor>()};
  adapter.a_tables = given.next<OptionalTensor>();
  adapter.b_planes = given.next<OptionalTensor>();
  adapter.b_row_offset = given.next<OptionalTensor>();
  adapter.b_row_index = given.next<OptionalTensor>();
  adapter.b_col_offset = given.next<OptionalTensor>();
  adapter.b_col_index = given.next<OptionalTensor>();
  adapter.expand = given.next<bool>();
  adapter.scale = given.next<double>();
  return adapter;
}

// ---- checks -------------------------------------------------------------------------------------

// Positions in a run ascend, so checking the last one bounds them all. For an empty run this reads
// the position before it, which is harmless and keeps the loop free of branches.
void check_last(const Lists& lists, int64_t lines, int64_t limit, const char* name,
                const char* limit_name) {
  if (lists.count == 0) return;
  int64_t largest = 0;
  for (int64_t run = 1; run <= 2 * lines; ++run) {
    const int64_t last = lists.offset[run] > 0 ? lists.offset[run] - 1 : 0;
    largest = lists.index[last] > largest ? lists.index[last] : largest;
  }
  RANDLORA_CHECK(largest < limit, name, "_index has a position ", largest, ", but ", limit_name,
                 " = ", limit, "; these tensors are of another layer");
}

// Every run of positions of A must ascend: all steps that do not ascend lie between two runs.
void check_ascending(const Lists& lists, int64_t lines) {
  const uint16_t* position = lists.index;
  int64_t falls = 0, between = 0;
  for (int64_t p = 1; p < lists.count; ++p) falls += position[p] <= position[p - 1];
  for (int64_t run = 1; run < 2 * lines; ++run) {
    const int64_t p = lists.offset[run];
    if (p > lists.offset[run - 1] && p < lists.count) between += position[p] <= position[p - 1];
  }
  RANDLORA_CHECK(falls == between,
                 "the positions of a_index must ascend from each entry of a_offset to the next");
}

// Lists of `lines` lines whose positions are below `limit`.
Lists checked_lists(const char* name, const Tensor& offset, const Tensor& index, int64_t lines,
                    int64_t limit, const char* limit_name, const Tensor& lam) {
  check_same_device(offset, name, lam, "lam");
  RANDLORA_CHECK(limit <= kLongestLine, name, "_index has positions up to ", kLongestLine - 1,
                 " at most, but ", limit_name, " = ", limit);
  const Lists lists = check_lists(offset, index, lines, std::string(name) + "_");
  if (lam.is_cpu()) check_last(lists, lines, limit, name, limit_name);
  return lists;
}

// Sets b.b_planes, and b.D, which follows from them.
void set_planes(TernaryBases& b, const Tensor& planes, const Tensor& lam) {
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

// The bases in the adapter's tensors. Throws if anything disagrees. r and n are lam's, d is gam's,
// and D follows from B.
TernaryBases checked_basis(const TernaryAdapter& of) {
  const Tensor& lam = of.lam;
  check_diagonals(lam, of.gam);
  TernaryBases b;
  b.r = lam.size(0);
  b.n = lam.size(1);
  b.d = of.gam.size(1);
  b.a = checked_lists("a", of.a_offset, of.a_index, b.r, b.d, "d", lam);
  if (lam.is_cpu()) check_ascending(b.a, b.r);
  const int given = of.b_row_offset.has_value() + of.b_row_index.has_value() +
                    of.b_col_offset.has_value() + of.b_col_index.has_value();
  RANDLORA_CHECK(given == (of.b_planes ? 0 : 4),
                 "B must be given either as b_planes or as b_row_offset, b_row_index, "
                 "b_col_offset and b_col_index, got ",
                 of.b_planes ? "b_planes and " : "", given, " of the other four");
  if (of.b_planes) {
    set_planes(b, *of.b_planes, lam);
  } else {
    b.D = (of.b_row_offset->numel() - 1) / 2;
    RANDLORA_CHECK(b.D > 0, "b_row_offset must have 2 * D + 1 entries, got ",
                   describe(*of.b_row_offset));
    b.b_rows = checked_lists("b_row", *of.b_row_offset, *of.b_row_index, b.D, b.K(), "K", lam);
    b.b_cols = checked_lists("b_col", *of.b_col_offset, *of.b_col_index, b.K(), b.D, "D", lam);
  }
  if (of.a_tables) b.a_tables = checked_tables(b, *of.a_tables, lam);
  return b;
}

// ---- the operators ------------------------------------------------------------------------------

// A layer, all of whose arguments have been checked.
struct Layer {
  const TernaryAdapter& adapter;
  const TernaryBases basis;
  const int64_t in, out, T;

  Layer(const TernaryAdapter& of, const Tensor& x, const OptionalTensor& weight,
        const OptionalTensor& bias)
      : adapter(of),
        basis(checked_basis(of)),
        in(of.expand ? basis.d : basis.D),
        out(of.expand ? basis.D : basis.d),
        T(check_linear(x, weight, bias, of.lam, in, out)) {}
};

// A product with dW: `call` points into the other members, and its results are still to be set.
struct Product {
  const Tensor from, lam, gam;  // contiguous; lambda and gamma in the compute type
  IndependentLinear call{};

  Product(const Layer& layer, const Tensor& from_, bool up, bool accumulate)
      : from(as_contiguous(from_)),
        lam(compute_copy(layer.adapter.lam, activation_dtype(from, "x"))),
        gam(compute_copy(layer.adapter.gam, activation_dtype(from, "x"))) {
    call.basis = layer.basis;
    call.lam = lam.const_data_ptr();
    call.gam = gam.const_data_ptr();
    call.from = from.const_data_ptr();
    call.dtype = activation_dtype(from, "x");
    call.T = layer.T;
    call.scale = layer.adapter.scale;
    call.up = up;
    call.accumulate = accumulate;
  }
};

Tensor independent_linear(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const TernaryAdapter& adapter) {
  const Layer layer(adapter, x, weight, bias);
  Product product(layer, x, adapter.expand, weight.has_value());
  const Tensor y = base_output(product.from, weight, bias, layer.out);
  product.call.to = y.mutable_data_ptr();
  run(x, product.call);
  return y;
}

Gradients independent_linear_backward(const Tensor& dy, const Tensor& x,
                                      const OptionalTensor& weight, const TernaryAdapter& adapter,
                                      bool need_dx, bool need_dlam_dgam) {
  const Layer layer(adapter, x, weight, {});
  check_output_gradient(dy, x, layer.out);
  if (!need_dx && !need_dlam_dgam) return {};
  Product product(layer, dy, !adapter.expand, weight.has_value());
  OptionalTensor xc, dx, dlam, dgam;
  if (need_dx) {
    dx = base_gradient(product.from, weight, x);
    product.call.to = dx->mutable_data_ptr();
  }
  if (need_dlam_dgam) {
    dlam = allocate_like(product.lam);
    dgam = allocate_like(product.gam);
    xc = as_contiguous(x);
    product.call.other = xc->const_data_ptr();
    product.call.dlam = dlam->mutable_data_ptr();
    product.call.dgam = dgam->mutable_data_ptr();
  }
  run(x, product.call);
  if (need_dlam_dgam) {
    dlam = cast(*dlam, adapter.lam.scalar_type());
    dgam = cast(*dgam, adapter.gam.scalar_type());
  }
  return {dx, dlam, dgam};
}

void boxed_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const auto x = given.next<Tensor>();
  const auto weight = given.next<OptionalTensor>(), bias = given.next<OptionalTensor>();
  const TernaryAdapter adapter = next_adapter(given);
  const Tensor y = explained([&] { return independent_linear(x, weight, bias, adapter); });
  stack[0] = torch::stable::detail::from(y);
}

void boxed_linear_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  const auto dy = given.next<Tensor>(), x = given.next<Tensor>();
  const auto weight = given.next<OptionalTensor>();
  const TernaryAdapter adapter = next_adapter(given);
  const bool need_dx = given.next<bool>(), need_dlam_dgam = given.next<bool>();
  const auto [dx, dlam, dgam] = explained(
      [&] { return independent_linear_backward(dy, x, weight, adapter, need_dx, need_dlam_dgam); });
  stack[0] = torch::stable::detail::from(dx);
  stack[1] = torch::stable::detail::from(dlam);
  stack[2] = torch::stable::detail::from(dgam);
}

const Operators operators{
    {"independent_linear(Tensor x, Tensor? weight, Tensor? bias, " RANDLORA_TERNARY_ADAPTER
     ") -> Tensor",
     boxed_linear},
    {"independent_linear_backward(Tensor dy, Tensor x, Tensor? weight, " RANDLORA_TERNARY_ADAPTER
     ", bool need_dx, bool need_dlam_dgam) -> (Tensor?, Tensor?, Tensor?)",
     boxed_linear_backward},
};

}  // namespace
}  // namespace randlora
