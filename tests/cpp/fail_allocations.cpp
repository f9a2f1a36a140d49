// tests/ops/test_out_of_memory.py preloads this to make the n-th tensor allocation fail.
// Tensors get memory from posix_memalign, called by libc10. Calls from elsewhere (oneDNN) succeed,
// because those callers do not survive a failure.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>

namespace {

std::atomic<long> left{-1};  // allocations until one fails; negative: never
std::atomic<long> failed{0};

bool is_of_tensors(const void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "libc10.so");
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void fail_at(long n) { left = n; }

__attribute__((visibility("default"))) long failures() { return failed; }

__attribute__((visibility("default"))) int posix_memalign(void** out, size_t alignment,
                                                          size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const auto next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (left >= 0 && is_of_tensors(__builtin_return_address(0)) && left-- == 0) {
    ++failed;
    return ENOMEM;
  }
  return next(out, alignment, size);
}
}
