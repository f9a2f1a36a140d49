// One fault of each kind that the execution gate must see. Without an argument: every one of them,
// committed by a process of its own, is caught. With one: that fault.
#include <cstdio>
#include <string>

#include "check.h"
#include "cuda/device/launch.h"
#include "cuda/device/ptx.h"
#include "test_device.h"

using namespace randlora;

namespace {

constexpr bool kThread = cuda_on_cpu::kThreadSanitizer;

__global__ void barriers_only(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

__global__ void missing_barrier(float* out) {
  auto* s = reinterpret_cast<float*>(shared_memory());
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}
__global__ void missing_syncwarp(float* out) {  // a shuffle orders no memory
  auto* s = reinterpret_cast<float*>(shared_memory());
  s[threadIdx.x] = 1;
  const float x = __shfl_sync(kWarp, 1.f, 0);
  out[threadIdx.x] = x + s[threadIdx.x ^ 1];
}
__global__ void out_of_bounds(float* out) {
  auto* s = reinterpret_cast<float*>(shared_memory());
  s[threadIdx.x + 1] = 1;  // the last thread writes past the end
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void uninitialised_read(float* out) {
  auto* s = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void cp_async_wait_too_few(float* out) {  // of two groups the second is not awaited
  auto* s = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x > 0) return;
  cp_async16(s, out);
  cp_async_commit();
  cp_async16(s + 4, out + 4);
  cp_async_commit();
  cp_async_wait<1>();
  out[0] = s[0] + s[4];
}
struct Fault {
  const char* name;
  void (*kernel)(float*);
  const char* want;  // what this build's output must hold; "": it need not see the fault
};
const char *kDisagree = kThread ? "ThreadSanitizer: data race" : "depend on the schedule",
           *kRace = kThread ? kDisagree : "", *kNaN = "NaN in the result",
           *kOverflow = cuda_on_cpu::kAddressSanitizer ? "heap-buffer-overflow" : "";
#define FAULT(name, want) {#name, name, want}
const Fault kFaults[] = {
    FAULT(missing_barrier, kDisagree), FAULT(missing_syncwarp, kRace),
    FAULT(out_of_bounds, kOverflow),   FAULT(divergent_barrier, "is divergent"),
    FAULT(uninitialised_read, kNaN),   FAULT(cp_async_wait_too_few, kNaN),
};

// One block of 128 threads over an array of zeros, in all schedules.
int commit_fault(const char* name) {
  for (const Fault& f : kFaults) {
    if (strcmp(f.name, name)) continue;
    TestDevice device;
    // Fibers that have lived through other blocks are not blind to a race in this one.
    launch(device, "barriers_only", barriers_only, 20, 128, 0, 10);
    const auto body = [&] {
      Array out(DType::f32, Values(128));
      launch(device, name, f.kernel, 1, 128, 512, out.as<float>());
      for (const double x : out.values())
        if (std::isnan(x)) std::printf("NaN in the result\n");
    };
    try {
      under_all_schedules(body);
    } catch (const cuda_on_cpu::Error& e) {
      std::printf("%s\n", e.what());
    }
    return 0;
  }
  return 1;
}

void faults_are_caught(const std::string& self) {
  for (const Fault& f : kFaults) {
    if (!*f.want) continue;
    FILE* child = popen(("'" + self + "' " + f.name + " 2>&1").c_str(), "r");
    std::string output;
    char line[1024];
    while (std::fgets(line, sizeof line, child)) output += line;
    pclose(child);
    EXPECT(output.find(f.want) != std::string::npos, "%s: no \"%s\" in \"%s\"", f.name, f.want,
           output.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) return commit_fault(argv[1]);
  faults_are_caught(argv[0]);
  return finish();
}
