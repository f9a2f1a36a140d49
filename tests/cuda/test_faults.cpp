// Faults that the execution gate must see. Without an argument: every one of them, committed by a
// process of its own, is caught. With one: that fault.
#include <cstdio>
#include <string>

#include "check.h"
#include "cuda/device/launch.h"
#include "cuda/device/ptx.h"
#include "test_device.h"

using namespace randlora;

namespace {

constexpr bool kThread = cuda_on_cpu::kThreadSanitizer;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddress = true;
#else
constexpr bool kAddress = false;
#endif

__global__ void barriers_only(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

// ---- faults -------------------------------------------------------------------------------------

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
__global__ void blocks_overlap(float* out) {  // a single pair of accesses in the whole grid
  __syncthreads();
  if (threadIdx.x == blockIdx.x) out[0] = static_cast<float>(blockIdx.x);
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
__global__ void skipped_barrier(float* out) {
  if (threadIdx.x >= 96) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x < 32) out[threadIdx.x] = __shfl_sync(kWarp, 1.f, 0);
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = static_cast<float>(__ballot_sync(kWarp, 1));
}
__global__ void uninitialised_read(float* out) {
  auto* s = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void shuffle_from_outside_mask(float* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.f, 16);
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
__global__ void cp_async_over_readers(float* out) {  // no barrier between a read and the next copy
  auto* s = reinterpret_cast<float*>(shared_memory());
  s[4 * threadIdx.x] = 1;
  __syncthreads();
  const float x = s[4 * (threadIdx.x ^ 1)];
  cp_async16(s + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[4 * threadIdx.x] = x + s[4 * threadIdx.x];
}
struct Fault {
  const char* name;
  void (*kernel)(float*);
  const char* want;  // what this build's output must hold; "": it need not see the fault
};
const char *kDisagree = kThread ? "ThreadSanitizer: data race" : "schedules disagree",
           *kRace = kThread ? kDisagree : "", *kNaN = "NaN in the result",
           *kOverflow = kAddress ? "heap-buffer-overflow" : "";
#define FAULT(name, want) {#name, name, want}
const Fault kFaults[] = {
    FAULT(missing_barrier, kDisagree),
    FAULT(missing_syncwarp, kRace),
    FAULT(blocks_overlap, kDisagree),
    FAULT(out_of_bounds, kOverflow),
    FAULT(divergent_barrier, "is divergent"),
    FAULT(skipped_barrier, "exit"),
    FAULT(barrier_against_shuffle, "waits for ever"),
    FAULT(uninitialised_read, kNaN),
    FAULT(shuffle_from_outside_mask, kNaN),
    FAULT(cp_async_wait_too_few, kNaN),
    FAULT(cp_async_over_readers, kDisagree),
};

// One block of 128 threads (two if blocks are at fault) over an array of zeros, in all schedules.
int commit_fault(const char* name) {
  for (const Fault& f : kFaults) {
    if (strcmp(f.name, name)) continue;
    TestDevice device;
    const bool wide = strstr(name, "cp_async");
    // Fibers that have lived through other blocks are not blind to a race in this one.
    launch(device, "barriers_only", barriers_only, 20, 128, 0, 10);
    const auto body = [&] {
      Array out(DType::f32, Values(wide ? 512 : 128));
      launch(device, name, f.kernel, strstr(name, "blocks") ? 2 : 1, 128, wide ? 2048 : 512,
             out.as<float>());
      for (const double x : out.values())
        if (std::isnan(x)) std::printf("NaN in the result\n");
      return out.raw();
    };
    try {
      if (!cuda_on_cpu::same_bits_under_all_schedules(body)) std::printf("schedules disagree\n");
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

__global__ void harmless(float*) {}

// What an error says, and what no card would launch.
void errors() {
  TestDevice device;
  const auto before = cuda_on_cpu::schedule;
  cuda_on_cpu::schedule = {};
  std::vector<float> out(128);
  const auto start = [&](void (*kernel)(float*), int threads, int64_t shared = 512,
                         Grid grid = {1, 3}) -> std::string {
    try {
      launch(device, "k", kernel, grid, threads, shared, out.data());
    } catch (const cuda_on_cpu::Error& e) {
      return e.what();
    }
    return "";
  };
  const std::string e = start(skipped_barrier, 128);
  EXPECT(e.rfind("kernel k, block (0, 0, 0), thread 96: exits while others wait", 0) == 0 &&
             e.find("test_faults.cpp:") != std::string::npos,
         "%s", e.c_str());
  EXPECT(start(harmless, 33) != "" && start(harmless, 32, 512, {1, 1 << 16}) != "", "a grid");
  EXPECT((start(harmless, 160) != "") == kThread, "160 threads");
  device.shared_bytes = kLeastShared;
  EXPECT(start(harmless, 32, kLeastShared + 1) != "", "more shared memory than there is");
  device.shared_bytes = 0;  // what every card gives unasked
  EXPECT(start(harmless, 32, kFreeShared) == "", "48 KiB of shared memory");
  cuda_on_cpu::schedule = before;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) return commit_fault(argv[1]);
  errors();
  faults_are_caught(argv[0]);
  return finish();
}
