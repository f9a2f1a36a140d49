#include <sstream>

#include "backend.h"

namespace randlora {
namespace {

const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 ||
         t == ScalarType::Half;
}

// Positions in a run ascend, so checking the last one bounds them all. For an empty run this reads
// the position before it, which is harmless and keeps the loop free of branches.
template <class Index>
int64_t largest_last(const AnyLists& lists, int64_t runs) {
  Index largest = 0;
  const auto* position = static_cast<const Index*>(lists.index);
  for (int64_t run = 1; run <= runs; ++run) {
    const int64_t last = lists.offset[run] > 0 ? lists.offset[run] - 1 : 0;
    largest = position[last] > largest ? position[last] : largest;
  }
  return largest;
}

void check_last(const AnyLists& lists, bool wide, int64_t lines, int64_t limit, const char* name,
                const char* limit_name) {
  if (lists.count == 0) return;
  const int64_t largest =
      wide ? largest_last<uint32_t>(lists, 2 * lines) : largest_last<uint16_t>(lists, 2 * lines);
  RANDLORA_CHECK(largest < limit, "packed: ", name, "_index has a position ", largest, ", but ",
                 limit_name, " = ", limit, "; these tensors are of another layer");
}

// Whether every run of positions ascends: all steps that do not ascend must lie between two runs.
template <class Index>
bool runs_ascend(const AnyLists& lists, int64_t runs) {
  const auto* position = static_cast<const Index*>(lists.index);
  int64_t falls = 0, between = 0;
  for (int64_t p = 1; p < lists.count; ++p) falls += position[p] <= position[p - 1];
  for (int64_t run = 1; run < runs; ++run) {
    const int64_t p = lists.offset[run];
    if (p > lists.offset[run - 1] && p < lists.count) between += position[p] <= position[p - 1];
  }
  return falls == between;
}

}  // namespace

AnyLists check_lists(const Tensor& offset, const Tensor& index, int64_t lines,
                     const std::string& prefix) {
  RANDLORA_CHECK(offset.scalar_type() == ScalarType::Long && offset.is_contiguous() &&
                     offset.dim() == 1 && offset.size(0) == 2 * lines + 1,
                 prefix,
                 "offset must be a contiguous int64 tensor of 2 * lines + 1 = ", 2 * lines + 1,
                 " entries, got ", describe(offset));
  const ScalarType t = index.scalar_type();
  RANDLORA_CHECK(
      (t == ScalarType::Short || t == ScalarType::Int) && index.is_contiguous() && index.dim() == 1,
      prefix, "index must be a contiguous int16 or int32 tensor, got ", describe(index));
  check_same_device(index, "index", offset, "offset");
  const int64_t *at = offset.const_data_ptr<int64_t>(), runs = 2 * lines;
  const AnyLists lists{at, index.const_data_ptr(), index.size(0)};
  if (!offset.is_cpu()) return lists;  // reading them would make the host wait
  RANDLORA_CHECK(at[0] == 0 && at[runs] == lists.count, prefix, "offset must run from 0 to ",
                 lists.count, ", the length of ", prefix, "index, but runs from ", at[0], " to ",
                 at[runs]);
  // Collects the sign bits of all offsets and steps in one word: this runs before every product,
  // and compilers vectorize a loop without branches.
  uint64_t signs = 0;
  for (int64_t q = 0; q < runs; ++q)
    signs |= uint64_t(at[q]) | (uint64_t(at[q + 1]) - uint64_t(at[q]));
  if (signs >> 63 != 0)
    for (int64_t q = 0; q < runs; ++q)
      RANDLORA_CHECK(at[q] >= 0 && at[q] <= at[q + 1], prefix,
                     "offset must not decrease, but entry ", q, " is ", at[q], " and the next ",
                     at[q + 1]);
  return lists;
}

std::string describe(const Tensor& t) {
  std::ostringstream s;
  s << "(";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ") " << name_of(t.scalar_type());
  t.is_cpu() ? s << " on cpu" : s << " on cuda:" << t.get_device_index();
  return s.str();
}

DType activation_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      RANDLORA_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                     describe(t));
  }
}

ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::f64: return ScalarType::Double;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

ScalarType compute_type(DType t) {
  return t == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

void check_floating(const Tensor& t, const char* name) {
  RANDLORA_CHECK(is_floating(t.scalar_type()), name,
                 " must be float32, float64, bfloat16 or float16, got ", describe(t));
}

void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  RANDLORA_CHECK(t.device() == as.device(), name, " is ", describe(t), " but ", as_name, " is ",
                 describe(as), "; they must be on one device");
}

Tensor compute_copy(const Tensor& t, DType dtype) {
  return as_contiguous(cast(t, compute_type(dtype)));
}

namespace {

// Checks and stores the sizes that do not depend on the packed form.
void check_diagonals(Basis& b, int64_t r, const Tensor& lam, const Tensor& gam, int64_t in_features,
                     int64_t out_features, std::optional<bool> expand) {
  check_floating(lam, "lam");
  check_floating(gam, "gam");
  check_same_device(gam, "gam", lam, "lam");
  RANDLORA_CHECK(in_features > 0 && out_features > 0,
                 "in_features and out_features must be positive, got ", in_features, " and ",
                 out_features);
  b.r = r;
  const bool d_is_in = expands(expand, in_features, out_features);
  b.d = d_is_in ? in_features : out_features;
  b.D = d_is_in ? out_features : in_features;
  // The shape of a slice does not determine n, so n comes from lam.
  b.n = expand && lam.dim() == 2 ? lam.size(1) : (b.d + r - 1) / r;
  RANDLORA_CHECK(lam.dim() == 2 && lam.size(0) == r && lam.size(1) == b.n && b.n > 0,
                 "lam must be (r, n) = (", r, ", ", b.n, "), got ", describe(lam),
                 " with a packed basis of r = ", r, " for a layer of ", in_features, " to ",
                 out_features, " features");
  RANDLORA_CHECK(gam.dim() == 2 && gam.size(0) == b.n && gam.size(1) == b.d,
                 "gam must be (n, d) = (", b.n, ", ", b.d, "), got ", describe(gam));
}

}  // namespace

Basis basis_of(const std::vector<Tensor>& packed, const Tensor& lam, const Tensor& gam,
               int64_t in_features, int64_t out_features, std::optional<bool> expand) {
  RANDLORA_CHECK(!packed.empty(), "packed must hold 6 tensors (lists) or 3 (bit planes), got 0");
  RANDLORA_CHECK(packed[0].dim() == 1 && packed[0].size(0) > 2 && packed[0].size(0) % 2 == 1,
                 "packed: a_offset must be a tensor of 2 * r + 1 entries, got ",
                 describe(packed[0]));
  Basis b;
  check_diagonals(b, (packed[0].size(0) - 1) / 2, lam, gam, in_features, out_features, expand);
  size_t count = packed.size();
  const bool dense = count > 0 && is_floating(packed[count - 1].scalar_type());
  count -= dense;
  const bool tables = count == 7 || count == 4;
  count -= tables;
  RANDLORA_CHECK(count == 6 || count == 3,
                 "packed must hold 6 tensors (lists) or 3 (bit planes), and on CUDA perhaps the "
                 "support tables of A and a dense B after them, got ",
                 packed.size(), "; take it from TernaryBasis.packed(device)");
  const bool on_cpu = lam.is_cpu();
  for (const Tensor& t : packed)
    if (!on_cpu || !t.is_cpu()) check_same_device(t, "packed", lam, "lam");
  b.a = check_lists(packed[0], packed[1], b.r, "packed: a_");
  b.wide = packed[1].scalar_type() == ScalarType::Int;
  if (on_cpu) check_last(b.a, b.wide, b.r, b.d, "a", "d");
  RANDLORA_CHECK(b.wide || (b.D <= 65536 && b.d <= 65536 && b.K() <= 65536),
                 "packed: int16 positions end at 65535, but D = ", b.D, ", d = ", b.d,
                 " and K = ", b.K());
  if (tables) {
    const Tensor& t = packed[count];
    const int64_t numbers = support_numbers(b.a.count, b.r, b.d);
    RANDLORA_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) == numbers,
                   "packed: the support tables must be an int32 tensor of ", numbers,
                   " numbers, got ", describe(t));
    b.a_tables = t.const_data_ptr<int32_t>();
  }
  if (dense) {
    const Tensor& B = packed[count + tables];
    RANDLORA_CHECK(B.dim() == 2 && B.size(0) == b.D && B.size(1) == b.K() && B.is_contiguous(),
                   "packed: the dense B must be a contiguous (D, K) = (", b.D, ", ", b.K(),
                   "), got ", describe(B));
    b.b_dense = B.const_data_ptr();
  }
  if (count == 3) {
    RANDLORA_CHECK(b.n <= 65536, "packed: bit planes serve up to n = 65536 bases, got n = ", b.n);
    const Tensor& p = packed[2];
    const int64_t words = words_of(b.K());
    RANDLORA_CHECK(p.scalar_type() == ScalarType::Long && p.is_contiguous() && p.dim() == 3 &&
                       p.size(0) == 2 && p.size(1) == b.D && p.size(2) == words,
                   "packed: b_planes must be a contiguous int64 tensor (2, D, ceil(K / 64)) = (2, ",
                   b.D, ", ", words, "), got ", describe(p));
    const auto* plus = static_cast<const uint64_t*>(p.const_data_ptr());
    b.b_planes = {plus, plus + b.D * words, words};
    return b;
  }
  b.b_rows = check_lists(packed[2], packed[3], b.D, "packed: b_row_");
  b.b_cols = check_lists(packed[4], packed[5], b.K(), "packed: b_col_");
  for (int i = 3; i <= 5; i += 2)
    RANDLORA_CHECK(packed[i].scalar_type() == packed[1].scalar_type(),
                   "packed: all index tensors must have one dtype, got ", describe(packed[1]),
                   " and ", describe(packed[i]));
  if (on_cpu) {
    check_last(b.b_rows, b.wide, b.D, b.K(), "b_row", "K");
    check_last(b.b_cols, b.wide, b.K(), b.D, "b_col", "D");
  }
  return b;
}

void check_ascending(const Basis& b) {
  const auto check = [&](const AnyLists& lists, int64_t lines, const char* name) {
    const bool ascend =
        b.wide ? runs_ascend<uint32_t>(lists, 2 * lines) : runs_ascend<uint16_t>(lists, 2 * lines);
    RANDLORA_CHECK(ascend, "packed: the positions of ", name,
                   "_index must ascend from each entry of ", name, "_offset to the next");
  };
  check(b.a, b.r, "a");
  if (b.has_lists()) check(b.b_rows, b.D, "b_row");
}

}  // namespace randlora
