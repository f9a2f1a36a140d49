// torch.ops.randlora: generation of balanced bases.
#include "../cpu/balanced.h"

#include "../core/balanced_spec.h"
#include "backend.h"

namespace randlora {
namespace {

void fill_balanced_(Tensor offset, Tensor row, Tensor sign, int64_t seed, int64_t role,
                    int64_t line_start, int64_t q, int64_t n) {
  constexpr int64_t limit = int64_t{1} << 32;  // lines and bases of the specification
  RANDLORA_CHECK(role == kRoleA || role == kRoleB, "role must be 0 (A) or 1 (B), got ", role);
  RANDLORA_CHECK(
      offset.scalar_type() == ScalarType::Long && offset.dim() == 1 && offset.size(0) > 1 &&
          offset.size(0) <= int64_t{1} << 31 && offset.is_contiguous(),
      "offset must be a contiguous int64 tensor (r + 1), r < 2^31, got ", describe(offset));
  const int64_t r = offset.size(0) - 1;
  RANDLORA_CHECK(q >= 1 && q <= r, "q must be in [1, r = ", r, "], got ", q);
  RANDLORA_CHECK(n >= 1 && n <= limit, "n must be in [1, 2^32], got ", n);
  const ScalarType t = row.scalar_type();
  RANDLORA_CHECK((t == ScalarType::Short || t == ScalarType::Int) && row.dim() == 1 &&
                     row.size(0) % q == 0 && row.is_contiguous(),
                 "row must be a contiguous int16 or int32 tensor (lines * q), q = ", q, ", got ",
                 describe(row));
  const int64_t lines = row.size(0) / q;
  RANDLORA_CHECK(t == ScalarType::Int || lines <= 65536,
                 "row is int16, which holds positions up to 65535, but there are ", lines,
                 " lines");
  RANDLORA_CHECK(sign.scalar_type() == ScalarType::Int && sign.dim() == 2 &&
                     sign.size(0) == row.size(0) && sign.size(1) == sign_words_of(n) &&
                     sign.is_contiguous(),
                 "sign must be a contiguous int32 tensor (lines * q, ceil(n / 32)) = (",
                 row.size(0), ", ", sign_words_of(n), "), got ", describe(sign));
  RANDLORA_CHECK(line_start >= 0 && line_start <= limit - lines, "line_start = ", line_start,
                 " with ", lines, " lines leaves the allowed range [0, 2^32)");
  check_same_device(row, "row", offset, "offset");
  check_same_device(sign, "sign", offset, "offset");
  const FillBalanced p{static_cast<uint64_t>(seed),
                       static_cast<uint32_t>(role),
                       line_start,
                       lines,
                       r,
                       q,
                       n,
                       t == ScalarType::Int,
                       offset.mutable_data_ptr<int64_t>(),
                       row.mutable_data_ptr(),
                       static_cast<uint32_t*>(sign.mutable_data_ptr())};
  if (runs_on_cuda(offset)) {
    TorchDevice device(offset);
    cuda_kernels().fill_balanced(p, device);
  } else {
    TorchRuntime runtime;
    fill_balanced(p, runtime);
  }
}

Tensor balanced_to_planes_op(Tensor offset, Tensor row, Tensor sign, int64_t rows, int64_t n) {
  const Balanced b = balanced_of(offset, row, sign, n);
  const int64_t r = offset.size(0) - 1, words = words_of(r * n);
  RANDLORA_CHECK(rows >= 0, "rows may not be negative, got ", rows);
  for (int64_t j = 0; offset.is_cpu() && j < r; ++j)  // on a card rows are trusted
    for (int64_t p = b.offset[j]; p < b.offset[j + 1]; ++p)
      RANDLORA_CHECK(b.line(p) < rows && (p == b.offset[j] || b.line(p - 1) < b.line(p)), "row[", p,
                     "] is ", b.line(p), ", but the rows of a group must ascend below ", rows);
  const Tensor planes = allocate({2, rows, words}, ScalarType::Long, offset);
  auto* plus = static_cast<uint64_t*>(planes.mutable_data_ptr());
  if (runs_on_cuda(offset)) {
    TorchDevice device(offset);
    cuda_kernels().balanced_to_planes(b, rows, r, n, plus, plus + rows * words, device);
  } else {
    TorchRuntime runtime;
    balanced_to_planes(b, rows, r, n, plus, plus + rows * words, runtime);
  }
  return planes;
}

template <class Library>
void implement(Library& m) {
  m.impl("fill_balanced_", RANDLORA_BOX(fill_balanced_));
  m.impl("balanced_to_planes", RANDLORA_BOX(balanced_to_planes_op));
}

}  // namespace
}  // namespace randlora

STABLE_TORCH_LIBRARY_FRAGMENT(randlora, m) {
  m.def(
      "fill_balanced_(Tensor(a!) offset, Tensor(b!) row, Tensor(c!) sign, int seed, int role, int "
      "line_start, int q, int n) -> ()");
  m.def("balanced_to_planes(Tensor offset, Tensor row, Tensor sign, int rows, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(randlora, CPU, m) { randlora::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(randlora, CUDA, m) { randlora::implement(m); }
