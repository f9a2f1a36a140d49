// What every operator file needs from torch's stable ABI: checks, the runtime, allocation.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/operators.h"

namespace randlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define RANDLORA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "randlora: ", __VA_ARGS__)

// torch's intra-op pool and allocator.
class TorchRuntime : public Runtime {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int slots, void (*task)(void*, int), void* arg) override;
  ~TorchRuntime();
  void* scratch(size_t bytes) override;

 private:
  std::optional<Tensor> block_;
};

// ---- errors from torch (backend.cpp) -----------------------------------------------------------

// torch's C interface reports a failed call by a code, and its C++ wrappers then throw the source
// text of the call. This throws torch's own message instead (callers look for "CUDA out of
// memory"), or rethrows `error` if it is ours.
[[noreturn]] void throw_with_reason(const std::exception& error);

// How TORCH_BOX passes an argument, and how a function gets its value. We take a str by its handle,
// because torch before 2.14 leaks it in the conversion to std::string (pytorch#191340).
template <class T>
struct Argument {
  using Boxed = T;
  static T unbox(T value) { return value; }
};
template <>
struct Argument<std::string> {
  using Boxed = StringHandle;
  static std::string unbox(StringHandle handle) {
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

// Wraps `function` for registration: if a call into torch fails, the wrapper throws torch's own
// message.
template <auto function>
struct Explained;
template <class Result, class... Args, Result (*function)(Args...)>
struct Explained<function> {
  static Result call(typename Argument<Args>::Boxed... args) {
    try {
      return function(Argument<Args>::unbox(std::move(args))...);
    } catch (const std::exception& error) {
      throw_with_reason(error);
    }
  }
  // g++ 12 does not compile `call` if its address is used only as a template argument.
  static constexpr auto address() { return &call; }
};
#define RANDLORA_BOX(function) TORCH_BOX(randlora::Explained<&function>::address())

// ---- checks (check.cpp); each message names the argument, what it was and what is allowed ------

std::string describe(const Tensor& t);  // "(2, 3) float32 on cpu"
std::optional<DType> dtype_of(ScalarType t);
ScalarType scalar_type(DType t);
DType activation_dtype(const Tensor& t, const char* name);
inline void check_floating(const Tensor& t, const char* name) { activation_dtype(t, name); }
void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name);

// Checks lists of `lines` lines in tensors named `prefix`offset and `prefix`index. On the CPU it
// also checks the offsets' values. It never checks the positions.
AnyLists check_lists(const Tensor& offset, const Tensor& index, int64_t lines,
                     const std::string& prefix);

// An operator that torch looks up by name costs microseconds, which a training step of 16 tokens
// notices. So we allocate through the C interface and skip copies that are not needed.
Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like);
inline Tensor allocate_like(const Tensor& t) {
  return allocate({t.sizes().begin(), t.sizes().end()}, t.scalar_type(), t);
}
// For a tensor that does not outlive the operator: the thread keeps its memory for the next call.
Tensor temporary(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like);
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
// `t` contiguous in the type that `dtype` computes in.
Tensor compute_copy(const Tensor& t, DType dtype);
ScalarType compute_type(DType dtype);

// The packed bases A (r, d) and B (D, K) of a layer, or of a slice of one; r and n are lam's, d is
// gam's. Throws if anything disagrees.
//   format "lists"   [a_offset, a_index, a_tables, b_row_offset, b_row_index, b_col_offset,
//                     b_col_index]
//   format "planes"  [a_offset, a_index, a_tables, b_planes]
// a_tables are the support_tables of A, which CUDA kernels read; empty on the CPU.
Basis basis_of(const std::vector<Tensor>& packed, const std::string& format, int64_t D,
               const Tensor& lam, const Tensor& gam);
// Throws if positions in the rows of B do not ascend; the CPU kernels that form dW rely on it.
// Reads all of them: cheap next to forming dW, expensive next to a product of few tokens. basis_of
// itself checks A, which has far fewer.
void check_b_ascending(const Basis& b);

}  // namespace randlora
