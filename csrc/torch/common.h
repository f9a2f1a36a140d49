// What every operator file needs from torch's stable ABI: checks, the runtime, allocation.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
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

// ---- errors from torch (backend.cpp) -----------------------------------------------------------

// torch's C interface reports a failed call by a code, and its C++ wrappers then throw the source
// text of the call. This throws torch's own message instead (callers look for "CUDA out of
// memory"), or rethrows `error` if it is ours.
[[noreturn]] void throw_with_reason(const std::exception& error);

template <class F>
auto explained(const F& fn) {
  try {
    return fn();
  } catch (const std::exception& error) {
    throw_with_reason(error);
  }
}
// Wraps `function` for registration.
template <auto function>
struct Explained;
template <class Result, class... Args, Result (*function)(Args...)>
struct Explained<function> {
  static Result call(Args... args) {
    return explained([&] { return function(std::move(args)...); });
  }
  // g++ 12 does not compile `call` if its address is used only as a template argument.
  static constexpr auto address() { return &call; }
};
#define RANDLORA_BOX(function) TORCH_BOX(randlora::Explained<&function>::address())

// The arguments of a boxed call, in the schema's order, for operators that have too many for a list
// of parameters. Each is to be taken once.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// CPU builds of torch lack some functions of its C interface, which is stable
// (torch/csrc/inductor/aoti_torch). Looking them up at run time lets one binary serve CPU and CUDA
// builds. Null if `library` is not loaded or lacks the function.
void* torch_symbol(const char* library, const char* name);

// The same; throws if there is none.
template <class F>
F torch_function(const char* library, const char* name) {
  void* found = torch_symbol(library, name);
  RANDLORA_CHECK(found != nullptr, "this torch has no ", name, " in ", library,
                 ", which our operators need; torch >= 2.11 has it");
  return reinterpret_cast<F>(found);
}

// Calls an operator of torch by its name.
template <class... Results, class... Args>
std::tuple<Results...> call_torch(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  const StableIValue* next = stack.data();
  const auto result = [&](auto* type) {
    return torch::stable::detail::to<std::remove_pointer_t<decltype(type)>>(*next++);
  };
  return {result(static_cast<Results*>(nullptr))...};  // braces: in order
}

// ---- checks (check.cpp); each message names the argument, what it was and what is allowed ------

std::string describe(const Tensor& t);  // "(2, 3) float32 on cpu"
std::optional<DType> dtype_of(ScalarType t);
ScalarType scalar_type(DType t);
DType activation_dtype(const Tensor& t, const char* name);  // throws unless it is one of ours
void check_same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name);

// Checks lists of `lines` lines in tensors named `prefix`offset and `prefix`index. On the CPU it
// also checks the offsets' values. It never checks the positions.
Lists check_lists(const Tensor& offset, const Tensor& index, int64_t lines,
                  const std::string& prefix);

// The planes in a tensor (2, rows, words) of the right dtype.
Planes view_planes(const Tensor& planes);

// An operator that torch looks up by name costs microseconds, which a training step of 16 tokens
// notices. So we allocate through the C interface and skip copies that are not needed.
Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like);
inline Tensor allocate_like(const Tensor& t) {
  return allocate({t.sizes().begin(), t.sizes().end()}, t.scalar_type(), t);
}
// Memory that does not outlive the operator. On the CPU these are bytes, which the thread keeps for
// the next call: making and dropping a tensor takes half a microsecond.
class Temporary {
 public:
  Temporary() = default;
  explicit Temporary(int64_t bytes);  // on the CPU
  Temporary(int64_t count, DType dtype, const Tensor& like);
  Temporary(Temporary&& other) noexcept : block_(std::exchange(other.block_, std::nullopt)) {}
  Temporary& operator=(Temporary&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Temporary();
  void* data() const { return block_->mutable_data_ptr(); }
  // Where our CUDA kernels run it has the dtype that was asked for.
  const Tensor& tensor() const { return *block_; }

 private:
  std::optional<Tensor> block_;
};
// torch's intra-op pool and allocator.
class TorchRuntime : public Runtime {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int slots, void (*task)(void*, int), void* arg) override;
  void* scratch(size_t bytes) override;

 private:
  Temporary block_;
};

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

// `t` contiguous in the type that `dtype` computes in.
Tensor compute_copy(const Tensor& t, DType dtype);

}  // namespace randlora
