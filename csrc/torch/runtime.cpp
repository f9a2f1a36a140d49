#include "common.h"

namespace randlora {
namespace {

Tensor allocate_on(const std::vector<int64_t>& sizes, ScalarType type, int32_t device_type,
                   int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return allocate_on(sizes, type, device_type, like.get_device_index());
}

void TorchRuntime::run(int slots, void (*task)(void*, int), void* arg) {
  if (slots == 1) return task(arg, 0);  // no parallel region for small work
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) task(arg, static_cast<int>(s));
  });
}

// Each calling thread keeps its last block, unless it is large. A fresh block would page-fault at
// every call, which costs up to a twentieth of a frozen layer's step.
void* TorchRuntime::scratch(size_t bytes) {
  constexpr size_t kKeepAtMost = size_t{64} << 20;
  thread_local std::optional<Tensor> kept;
  thread_local size_t kept_bytes = 0;
  if (kept && bytes <= kept_bytes) return kept->mutable_data_ptr();
  block_ = allocate_on({static_cast<int64_t>(bytes)}, ScalarType::Byte,
                       aoti_torch_device_type_cpu(), -1);
  if (bytes <= kKeepAtMost) kept = block_, kept_bytes = bytes;
  return block_->mutable_data_ptr();
}

}  // namespace randlora
