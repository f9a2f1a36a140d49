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

}  // namespace

Lists check_lists(const Tensor& offset, const Tensor& index, int64_t lines,
                  const std::string& prefix) {
  RANDLORA_CHECK(offset.scalar_type() == ScalarType::Long && offset.is_contiguous() &&
                     offset.dim() == 1 && offset.size(0) == 2 * lines + 1,
                 prefix,
                 "offset must be a contiguous int64 tensor of 2 * lines + 1 = ", 2 * lines + 1,
                 " entries, got ", describe(offset));
  RANDLORA_CHECK(
      index.scalar_type() == ScalarType::Short && index.is_contiguous() && index.dim() == 1, prefix,
      "index must be a contiguous int16 tensor, got ", describe(index));
  check_same_device(index, "index", offset, "offset");
  const int64_t *at = offset.const_data_ptr<int64_t>(), runs = 2 * lines;
  Lists lists;
  lists.offset = at;
  lists.index = static_cast<const uint16_t*>(index.const_data_ptr());
  lists.count = index.size(0);
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

Planes view_planes(const Tensor& planes) {
  Planes view;
  view.words = planes.size(2);
  view.plus = static_cast<const uint64_t*>(planes.const_data_ptr());
  view.minus = view.plus + planes.size(1) * view.words;
  return view;
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

void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  RANDLORA_CHECK(t.device() == as.device(), name, " is ", describe(t), " but ", as_name, " is ",
                 describe(as), "; they must be on one device");
}

Tensor compute_copy(const Tensor& t, DType dtype) {
  return as_contiguous(cast(t, scalar_type(compute_dtype(dtype))));
}

}  // namespace randlora
