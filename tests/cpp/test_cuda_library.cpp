// Opens librandlora_cuda.so as the binding does, with or without a GPU in the machine.
//   test_cuda_library PATH
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/cuda_table.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

class NoDevice : public randlora::Device {
  void* scratch(size_t) override { return nullptr; }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::printf("usage: test_cuda_library PATH\n"), 2;
  void* handle = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!handle) return std::printf("failed: %s\n", dlerror()), 1;
  const auto table =
      reinterpret_cast<randlora::CudaKernelsFunction>(dlsym(handle, randlora::kCudaSymbol));
  if (!table) return std::printf("failed: %s\n", dlerror()), 1;
  const randlora::CudaKernels& kernels = *table();

  expect(kernels.interface == randlora::kCudaInterface, "interface of the same headers");
  expect(!std::strncmp(kernels.build, "nvcc ", 5), "the compiler in `build`");
  void* const* entries = reinterpret_cast<void* const*>(&kernels.describe);
  const void* end = &kernels + 1;
  for (; entries < end; ++entries) expect(*entries != nullptr, "every function is there");

  // With a GPU this describes it. Without one, an exception must cross between the libraries.
  NoDevice device;
  try {
    kernels.make_current(0);
    kernels.describe(0, device);
    expect(device.multiprocessors > 1 && device.shared_bytes > 48 << 10, "facts about the card");
    std::printf("card 0: %d multiprocessors, %ld bytes of shared memory a block\n",
                device.multiprocessors, static_cast<long>(device.shared_bytes));
  } catch (const std::runtime_error& error) {
    expect(!std::strncmp(error.what(), "randlora: ", 10), "our own words in an error");
    std::printf("no card: %s\n", error.what());
  }
  std::printf("%s\n%d failures\n", kernels.build, failures);
  return failures != 0;
}
