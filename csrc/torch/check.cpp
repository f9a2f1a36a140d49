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
  RANDLORA_CHECK(largest < limit, "packed: ", name, "_index has a position ", largest, ", but ",
                 limit_name, " = ", limit, "; these tensors are of another layer");
}

// Every run of positions must ascend: all steps that do not ascend lie between two runs.
void check_ascending(const AnyLists& any, int64_t lines, const char* name) {
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
  RANDLORA_CHECK(ascend, "packed: the positions of ", name,
                 "_index must ascend from each entry of ", name, "_offset to the next");
}

Planes check_b_planes(const Basis& b, const Tensor& planes) {
  RANDLORA_CHECK(b.n <= 65536, "packed: bit planes serve up to n = 65536 bases, got n = ", b.n);
  const int64_t words = words_of(b.K());
  RANDLORA_CHECK(planes.scalar_type() == ScalarType::Long && planes.is_contiguous() &&
                     planes.dim() == 3 && planes.size(0) == 2 && planes.size(1) == b.D &&
                     planes.size(2) == words,
                 "packed: b_planes must be a contiguous int64 tensor (2, D, ceil(K / 64)) = (2, ",
                 b.D, ", ", words, "), got ", describe(planes));
  const auto* plus = static_cast<const uint64_t*>(planes.const_data_ptr());
  return {plus, plus + b.D * words, words};
}

const int32_t* check_a_tables(const Basis& b, const Tensor& tables) {
  const int64_t numbers = support_numbers(b.a.count, b.r, b.d);
  RANDLORA_CHECK(tables.scalar_type() == ScalarType::Int && tables.dim() == 1 &&
                     tables.is_contiguous() && (tables.size(0) == numbers || tables.size(0) == 0),
                 "packed: the support tables must be an int32 tensor of ", numbers,
                 " numbers, or of none, got ", describe(tables));
  return tables.size(0) ? tables.const_data_ptr<int32_t>() : nullptr;
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
  const AnyLists lists{at, index.const_data_ptr(), index.size(0), t == ScalarType::Int};
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

std::optional<DType> dtype_of(ScalarType t) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (scalar_type(dtype) == t) return dtype;
  return {};
}

DType activation_dtype(const Tensor& t, const char* name) {
  const auto dtype = dtype_of(t.scalar_type());
  RANDLORA_CHECK(dtype, name, " must be float32, float64, bfloat16 or float16, got ", describe(t));
  return *dtype;
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

void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  RANDLORA_CHECK(t.device() == as.device(), name, " is ", describe(t), " but ", as_name, " is ",
                 describe(as), "; they must be on one device");
}

Tensor compute_copy(const Tensor& t, DType dtype) {
  return as_contiguous(cast(t, compute_type(dtype)));
}

Basis basis_of(const std::vector<Tensor>& packed, const std::string& format, int64_t D,
               const Tensor& lam, const Tensor& gam) {
  const bool planes = format == "planes";
  RANDLORA_CHECK(planes || format == "lists", "format must be 'lists' or 'planes', got '", format,
                 "'");
  const size_t count = planes ? 4 : 7;
  RANDLORA_CHECK(packed.size() == count, "packed must hold ", count, " tensors in format '", format,
                 "', got ", packed.size(), "; take them from TernaryBasis.packed(device)");
  check_floating(lam, "lam");
  check_floating(gam, "gam");
  check_same_device(gam, "gam", lam, "lam");
  RANDLORA_CHECK(lam.dim() == 2 && lam.numel() > 0, "lam must be (r, n), got ", describe(lam));
  Basis b;
  b.r = lam.size(0), b.n = lam.size(1), b.D = D;
  RANDLORA_CHECK(gam.dim() == 2 && gam.size(0) == b.n && gam.size(1) > 0,
                 "gam must be (n, d) with n = ", b.n, ", got ", describe(gam));
  b.d = gam.size(1);
  RANDLORA_CHECK(b.d <= b.K(), "gam must be (n, d) with d at most K = r * n = ", b.K(), ", got ",
                 describe(gam), " with lam ", describe(lam));
  RANDLORA_CHECK(D > 0, "D must be positive, got ", D);
  const bool on_cpu = lam.is_cpu();
  for (const Tensor& t : packed)
    if (!on_cpu || !t.is_cpu()) check_same_device(t, "packed", lam, "lam");
  b.a = check_lists(packed[0], packed[1], b.r, "packed: a_");
  if (on_cpu) {
    check_last(b.a, b.r, b.d, "a", "d");
    check_ascending(b.a, b.r, "a");
  }
  RANDLORA_CHECK(b.a.wide || (b.D <= 65536 && b.d <= 65536 && b.K() <= 65536),
                 "packed: int16 positions end at 65535, but D = ", b.D, ", d = ", b.d,
                 " and K = ", b.K());
  b.a_tables = check_a_tables(b, packed[2]);
  if (planes) {
    b.b_planes = check_b_planes(b, packed[3]);
    return b;
  }
  b.b_rows = check_lists(packed[3], packed[4], b.D, "packed: b_row_");
  b.b_cols = check_lists(packed[5], packed[6], b.K(), "packed: b_col_");
  for (int i = 4; i <= 6; i += 2)
    RANDLORA_CHECK(packed[i].scalar_type() == packed[1].scalar_type(),
                   "packed: all index tensors must have one dtype, got ", describe(packed[1]),
                   " and ", describe(packed[i]));
  if (on_cpu) {
    check_last(b.b_rows, b.D, b.K(), "b_row", "K");
    check_last(b.b_cols, b.K(), b.D, "b_col", "D");
  }
  return b;
}

void check_b_ascending(const Basis& b) {
  if (b.has_lists()) check_ascending(b.b_rows, b.D, "b_row");
}

}  // namespace randlora
