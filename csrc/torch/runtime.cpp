#include "backend.h"

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

// Memory that a thread keeps for its next temporaries. malloc returns freed memory to the system,
// and getting it back faults page by page: this took up to a fifth of a training step of
// SmolLM2.
class KeptBlocks {
 public:
  // The smallest block that fits. If none does, a new block replaces the largest.
  Tensor take(int64_t bytes) {
    size_t best = free_.size(), largest = 0;
    for (size_t i = 0; i < free_.size(); ++i) {
      const int64_t size = free_[i].numel();
      if (size >= bytes && (best == free_.size() || size < free_[best].numel())) best = i;
      if (size > free_[largest].numel()) largest = i;
    }
    if (best < free_.size()) return remove(best);
    if (!free_.empty()) remove(largest);
    return allocate_on({bytes}, ScalarType::Byte, aoti_torch_device_type_cpu(), -1);
  }
  void give_back(const Tensor& block) {
    if (bytes_ + block.numel() > kKeepAtMost) return;
    free_.push_back(block);
    bytes_ += block.numel();
  }

 private:
  static constexpr int64_t kKeepAtMost = int64_t{256} << 20;

  Tensor remove(size_t i) {
    std::swap(free_[i], free_.back());
    const Tensor block = free_.back();
    free_.pop_back();
    bytes_ -= block.numel();
    return block;
  }

  std::vector<Tensor> free_;
  int64_t bytes_ = 0;
};

thread_local KeptBlocks kept_blocks;

}  // namespace

Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return allocate_on(sizes, type, device_type, like.get_device_index());
}

Temporary::Temporary(int64_t bytes) : block_(kept_blocks.take(bytes)) {}

Temporary::Temporary(int64_t count, DType dtype, const Tensor& like)
    : block_(runs_on_cuda(like) ? allocate({count}, scalar_type(dtype), like)
                                : kept_blocks.take(count * bytes_of(dtype))) {}

Temporary::~Temporary() {
  if (block_ && block_->scalar_type() == ScalarType::Byte) kept_blocks.give_back(*block_);
}

void TorchRuntime::run(int slots, void (*task)(void*, int), void* arg) {
  if (slots == 1) return task(arg, 0);  // no parallel region for small work
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) task(arg, static_cast<int>(s));
  });
}

void* TorchRuntime::scratch(size_t bytes) {
  block_ = Temporary();  // gives back what it has, before it takes
  block_ = Temporary(static_cast<int64_t>(bytes));
  return block_.data();
}

}  // namespace randlora
