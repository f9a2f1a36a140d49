// torch.ops.randlora: generation, packing and expansion of ternary bases.
#include <cmath>

#include "../core/ternary_spec.h"
#include "backend.h"

namespace randlora {
namespace {

constexpr int64_t kIndexLimit = int64_t{1} << 32;  // the specification has 32-bit rows and columns

// Returns the number of rows.
int64_t check_planes(const Tensor& planes, int64_t cols) {
  RANDLORA_CHECK(planes.scalar_type() == ScalarType::Long && planes.dim() == 3 &&
                     planes.size(0) == 2 && planes.is_contiguous(),
                 "planes must be a contiguous int64 tensor (2, rows, words), got ",
                 describe(planes));
  RANDLORA_CHECK(cols >= 0 && planes.size(2) == words_of(cols), "cols = ", cols, " needs ",
                 words_of(cols < 0 ? 0 : cols), " words a row and may not be negative; planes is ",
                 describe(planes));
  return planes.size(1);
}

// Waits for the device.
Tensor on_cpu(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

void fill_planes_(Tensor planes, int64_t seed, int64_t role, int64_t row_start, int64_t col_start,
                  int64_t cols, int64_t threshold) {
  const int64_t rows = check_planes(planes, cols);
  RANDLORA_CHECK(role >= 0 && role <= kRoleColumns && role != 2,
                 "role must be 0 (A), 1 (B), or 3 to 5 (the signs of Hadamard bases), got ", role);
  RANDLORA_CHECK(row_start >= 0 && row_start <= kIndexLimit - rows, "row_start = ", row_start,
                 " with ", rows, " rows leaves the allowed range [0, 2^32)");
  RANDLORA_CHECK(col_start >= 0 && col_start <= kIndexLimit - cols, "col_start = ", col_start,
                 " with ", cols, " columns leaves the allowed range [0, 2^32)");
  RANDLORA_CHECK(threshold >= 1 && threshold <= int64_t{1} << 31,
                 "threshold must be in [1, 2^31], got ", threshold);
  FillPlanes p{};
  p.seed = static_cast<uint64_t>(seed);
  p.role = static_cast<uint32_t>(role);
  p.threshold = static_cast<uint32_t>(threshold);
  p.row_start = row_start;
  p.rows = rows;
  p.col_start = col_start;
  p.cols = cols;
  p.plus = static_cast<uint64_t*>(planes.mutable_data_ptr());
  p.minus = p.plus + rows * words_of(cols);
  run(planes, p);
}

std::tuple<Tensor, Tensor> pack_dense_op(Tensor dense) {
  RANDLORA_CHECK(dense.is_cpu() && dense.dim() == 2 && dense.numel() > 0,
                 "dense must be (rows, cols) on the CPU and not empty, got ", describe(dense));
  const DType dtype = activation_dtype(dense, "dense");
  const Tensor x = as_contiguous(dense);
  const int64_t rows = x.size(0), cols = x.size(1), words = words_of(cols);
  Tensor planes = allocate({2, rows, words}, ScalarType::Long, x);
  Tensor value = torch::stable::empty({}, ScalarType::Double);
  PackReport report;
  PackDense p{};
  p.dense = x.const_data_ptr();
  p.dtype = dtype;
  p.rows = rows;
  p.cols = cols;
  p.plus = static_cast<uint64_t*>(planes.mutable_data_ptr());
  p.minus = p.plus + rows * words;
  p.report = &report;
  TorchRuntime runtime;
  cpu_kernels().pack_dense(p, runtime);
  // If a is infinite and all else is right, we name element (0, 0).
  const int64_t count = rows * cols, bad = static_cast<int64_t>(report.bad) % count;
  RANDLORA_CHECK(
      static_cast<int64_t>(report.bad) == count && std::isfinite(report.a),
      "dense is not ternary: element (", bad / cols, ", ", bad % cols,
      ") is none of -a, 0, +a, where a is the magnitude of its first element that is not zero");
  *value.mutable_data_ptr<double>() = report.a;
  return {planes, value};
}

std::tuple<Tensor, Tensor> planes_to_lists(Tensor planes, int64_t cols, bool by_column) {
  const int64_t rows = check_planes(planes, cols);
  const int64_t lines = by_column ? cols : rows, longest = by_column ? rows : cols;
  RANDLORA_CHECK(longest <= kLongestLine, "lists have lines of at most ", kLongestLine,
                 " elements, got ", longest);
  Tensor offset = allocate({2 * lines + 1}, ScalarType::Long, planes);
  FillLists p{};
  p.planes = view_planes(planes);
  p.rows = rows;
  p.cols = cols;
  p.by_column = by_column;
  p.offset = offset.mutable_data_ptr<int64_t>();
  run(planes, static_cast<const CountLists&>(p));
  const Tensor total = on_cpu(torch::stable::narrow(offset, 0, 2 * lines, 1));
  Tensor index = allocate({*total.const_data_ptr<int64_t>()}, ScalarType::Short, planes);
  p.index = static_cast<uint16_t*>(index.mutable_data_ptr());
  run(planes, p);
  return {offset, index};
}

Tensor planes_to_dense_op(Tensor planes, int64_t cols, double value, ScalarType dtype) {
  const int64_t rows = check_planes(planes, cols);
  // CUDA kernels count the columns, and go some past their end, in 32-bit integers.
  constexpr int64_t kMost = int64_t{1} << 30;
  RANDLORA_CHECK(cols <= kMost, "cols = ", cols,
                 " leaves the allowed range [0, 2^30] of a dense matrix");
  const auto type = dtype_of(dtype);
  RANDLORA_CHECK(type, "dtype must be float32, float64, bfloat16 or float16");
  Tensor out = allocate({rows, cols}, dtype, planes);
  PlanesToDense p{};
  p.planes = view_planes(planes);
  p.rows = rows;
  p.cols = cols;
  p.value = value;
  p.out = out.mutable_data_ptr();
  p.dtype = *type;
  run(planes, p);
  return out;
}

Tensor support_tables_op(Tensor a_offset, Tensor a_index, int64_t d) {
  const int64_t r = a_offset.numel() / 2;
  const Lists a = check_lists(a_offset, a_index, r, "a_");
  RANDLORA_CHECK(d > 0, "d must be positive, got ", d);
  if (!runs_on_cuda(a_offset)) return allocate({0}, ScalarType::Int, a_offset);
  Tensor tables = allocate({support_numbers(a.count, r, d)}, ScalarType::Int, a_offset);
  TorchDevice device(a_offset);
  cuda_kernels().support_tables(a, r, d, tables.mutable_data_ptr<int32_t>(), device);
  return tables;
}

const Operators operators{
    {"fill_planes_(Tensor(a!) planes, int seed, int role, int row_start, int col_start, int cols, "
     "int threshold) -> ()",
     RANDLORA_BOX(fill_planes_)},
    {"pack_dense(Tensor dense) -> (Tensor, Tensor)", RANDLORA_BOX(pack_dense_op)},
    {"planes_to_lists(Tensor planes, int cols, bool by_column) -> (Tensor, Tensor)",
     RANDLORA_BOX(planes_to_lists)},
    {"planes_to_dense(Tensor planes, int cols, float value, ScalarType dtype) -> Tensor",
     RANDLORA_BOX(planes_to_dense_op)},
    {"support_tables(Tensor a_offset, Tensor a_index, int d) -> Tensor",
     RANDLORA_BOX(support_tables_op)},
};

}  // namespace
}  // namespace randlora
