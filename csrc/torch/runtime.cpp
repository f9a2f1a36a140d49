#include "common.h"

namespace randlora {

void TorchRuntime::run(int slots, void (*task)(void*, int), void* arg) {
  if (slots == 1) return task(arg, 0);  // no parallel region for small work
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) task(arg, static_cast<int>(s));
  });
}

void* TorchRuntime::scratch(size_t bytes) {
  held_.push_back(torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte));
  return held_.back().mutable_data_ptr();
}

}  // namespace randlora
