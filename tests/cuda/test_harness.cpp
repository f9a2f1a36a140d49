// Tests of the execution gate itself. Without an argument: every primitive does what CUDA says, and
// every planted fault below, each in a process of its own, is caught. With one: that fault.
#include <cstdio>
#include <string>

#include "check.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "test_device.h"

using namespace randlora;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThread = true, kAddress = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool kThread = false, kAddress = true;
#else
constexpr bool kThread = false, kAddress = false;
#endif
constexpr unsigned kFull = 0xffffffffu;

template <class T>
__device__ T* shared_as() {
  return reinterpret_cast<T*>(shared_memory());
}

__global__ void barriers_only(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

// ---- faults --------------------------------------------------------------------------------------

__global__ void missing_barrier(float* out) {
  float* s = shared_as<float>();
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}
__global__ void missing_second_barrier(float* out) {  // the write of round 1 overtakes a read of 0
  float* s = shared_as<float>();
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = static_cast<float>(threadIdx.x + 1000 * round);
    __syncthreads();
    out[round * blockDim.x + threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
  }
}
__global__ void missing_syncwarp(float* out) {  // a shuffle orders no memory
  float* s = shared_as<float>();
  s[threadIdx.x] = 1;
  const float x = __shfl_sync(kFull, 1.f, 0);
  out[threadIdx.x] = x + s[threadIdx.x ^ 1];
}
__global__ void two_threads_overlap(float* out) {
  if (threadIdx.x == 5 || threadIdx.x == 77) out[0] = static_cast<float>(threadIdx.x);
}
__global__ void blocks_overlap(float* out) {  // a single pair of accesses in the whole grid
  __syncthreads();
  if (threadIdx.x == blockIdx.x) out[0] = static_cast<float>(blockIdx.x);
}
__global__ void out_of_bounds(float* out) {
  float* s = shared_as<float>();
  s[threadIdx.x + 1] = 1;  // the last thread writes past the end
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void out_of_bounds_global(float* out) { out[threadIdx.x + 1] = 1; }
__global__ void misaligned_vector(float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out + 1) = make_float4(1, 2, 3, 4);
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
  if (threadIdx.x < 32) out[threadIdx.x] = __shfl_sync(kFull, 1.f, 0);
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = static_cast<float>(__ballot_sync(kFull, 1));
}
__global__ void uninitialised_read(float* out) {
  float* s = shared_as<float>();
  if (threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void mask_lacks_caller(float* out) {
  out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.f, 1);
}
__global__ void mask_names_absent_lanes(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1);
}
__global__ void masks_differ(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 2 ? kFull : 0x55555555u, 1.f, 2);
}
__global__ void shuffle_from_outside_mask(float* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.f, 8);
}
__global__ void missing_cp_async_wait(float* out) {
  float* s = shared_as<float>();
  cp_async16(s + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit();
  __syncthreads();
  const float x = s[4 * threadIdx.x];
  __syncthreads();
  out[4 * threadIdx.x] = x;
}
__global__ void cp_async_wait_too_few(float* out) {  // of two groups the second is not awaited
  float* s = shared_as<float>();
  if (threadIdx.x > 0) return;
  cp_async16(s, out);
  cp_async_commit();
  cp_async16(s + 4, out + 4);
  cp_async_commit();
  cp_async_wait<1>();
  out[0] = s[0] + s[4];
}
__global__ void cp_async_over_readers(float* out) {  // no barrier between a read and the next copy
  float* s = shared_as<float>();
  s[4 * threadIdx.x] = 1;
  __syncthreads();
  const float x = s[4 * (threadIdx.x ^ 1)];
  cp_async16(s + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[4 * threadIdx.x] = x + s[4 * threadIdx.x];
}
__global__ void misaligned_cp_async(float* out) { cp_async16(shared_memory(), out + 1); }
__global__ void misaligned_ldmatrix(float* out) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + 2);
  out[threadIdx.x] = static_cast<float>(r[0]);
}
__global__ void ldmatrix_outside(float* out) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + 128 * sizeof(float));
  out[threadIdx.x] = static_cast<float>(r[0]);
}

// What the output of each build must hold. "" takes anything: this build need not see it.
struct Fault {
  const char* name;
  void (*kernel)(float*);
  const char *plain, *address, *thread;
};
#define FAULT(name, ...) {#name, name, __VA_ARGS__}
const char *kDisagree = "schedules disagree", *kNaN = "NaN in the result",
           *kRace = "ThreadSanitizer: data race";
const Fault kFaults[] = {
    FAULT(missing_barrier, kDisagree, kDisagree, kRace),
    FAULT(missing_second_barrier, kDisagree, kDisagree, kRace),
    FAULT(missing_syncwarp, "", "", kRace),
    FAULT(two_threads_overlap, kDisagree, kDisagree, kRace),
    FAULT(blocks_overlap, kDisagree, kDisagree, kRace),
    FAULT(out_of_bounds, "", "heap-buffer-overflow", ""),
    FAULT(out_of_bounds_global, "", "heap-buffer-overflow", ""),
    FAULT(misaligned_vector, "", "misaligned address", ""),
    FAULT(divergent_barrier, "is divergent", "is divergent", "is divergent"),
    FAULT(skipped_barrier, "exit", "exit", "exit"),
    FAULT(barrier_against_shuffle, "waits for ever", "waits for ever", "waits for ever"),
    FAULT(uninitialised_read, kNaN, kNaN, kNaN),
    FAULT(mask_lacks_caller, "lacks the calling lane", "lacks the calling lane",
          "lacks the calling lane"),
    FAULT(mask_names_absent_lanes, "exit", "exit", "exit"),
    FAULT(masks_differ, "different masks", "different masks", "different masks"),
    FAULT(shuffle_from_outside_mask, kNaN, kNaN, kNaN),
    FAULT(missing_cp_async_wait, kNaN, kNaN, kNaN),
    FAULT(cp_async_wait_too_few, kNaN, kNaN, kNaN),
    FAULT(cp_async_over_readers, kDisagree, kDisagree, kRace),
    FAULT(misaligned_cp_async, "not 16-byte aligned", "not 16-byte aligned", "not 16-byte aligned"),
    FAULT(misaligned_ldmatrix, "not 16-byte aligned", "not 16-byte aligned", "not 16-byte aligned"),
    FAULT(ldmatrix_outside, "not in the block's", "not in the block's", "not in the block's"),
};

// One block of 128 threads (two where blocks are at fault) over an array of zeros, in all schedules.
int commit_fault(const char* name) {
  for (const Fault& f : kFaults) {
    if (strcmp(f.name, name)) continue;
    TestDevice device;
    const bool wide = strstr(name, "cp_async");
    // Fibers that have lived through other blocks are not blind to a race in this one.
    launch(device, "barriers_only", barriers_only, 20, 128, 0, 10);
    const auto body = [&] {
      Array out(DType::f32, std::vector<double>(wide ? 512 : strstr(name, "second") ? 256 : 128));
      launch(device, name, f.kernel, strstr(name, "blocks") ? 2 : 1, 128, wide ? 2048 : 512,
             out.as<float>());
      for (double v : out.values())
        if (std::isnan(v)) {
          std::printf("NaN in the result\n");
          break;
        }
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
    const char* want = kThread ? f.thread : kAddress ? f.address : f.plain;
    if (!*want) continue;
    FILE* child = popen(("'" + self + "' " + f.name + " 2>&1").c_str(), "r");
    std::string output;
    char line[1024];
    while (std::fgets(line, sizeof line, child)) output += line;
    pclose(child);
    EXPECT(output.find(want) != std::string::npos, "%s: no \"%s\" in \"%s\"", f.name, want,
           output.c_str());
  }
}

// ---- primitives ----------------------------------------------------------------------------------

TestDevice device;

// Which lane the programming guide says each shuffle reads.
int source_lane(int mode, int l, int by, int width) {
  const int begin = l / width * width;
  if (mode == 0) return begin + by % width;
  if (mode == 1) return l - by < begin ? l : l - by;
  if (mode == 2) return l + by >= begin + width ? l : l + by;
  return l ^ by;
}
template <class T>
__global__ void shuffle_kernel(T* out, int mode, int by, int width) {
  const T v = static_cast<T>(threadIdx.x) * 3;
  out[threadIdx.x] = mode == 0   ? __shfl_sync(kFull, v, by, width)
                     : mode == 1 ? __shfl_up_sync(kFull, v, by, width)
                     : mode == 2 ? __shfl_down_sync(kFull, v, by, width)
                                 : __shfl_xor_sync(kFull, v, by, width);
}
template <class T>
void shuffles() {
  for (int mode = 0; mode < 4; ++mode)
    for (int width : {32, 16, 4, 1})
      for (int by = 0; by < width; by += 3) {
        std::vector<T> out(64);
        launch(device, "shuffle", shuffle_kernel<T>, 1, 64, 0, out.data(), mode, by, width);
        for (int t = 0; t < 64; ++t)
          EXPECT(out[t] == static_cast<T>(3 * (t / 32 * 32 + source_lane(mode, t % 32, by, width))),
                 "mode %d, width %d, by %d, thread %d", mode, width, by, t);
      }
}

__global__ void vote_kernel(unsigned* out) {
  const unsigned t = threadIdx.x;
  out[t] = __ballot_sync(kFull, t % 3 == 0);
  out[64 + t] = static_cast<unsigned>(__any_sync(kFull, t == 40) | __all_sync(kFull, t < 32) << 1);
}
void votes() {
  std::vector<unsigned> out(128);
  launch(device, "vote", vote_kernel, 1, 64, 0, out.data());
  for (unsigned t = 0; t < 64; ++t) {
    unsigned ballot = 0;
    for (unsigned l = 0; l < 32; ++l) ballot |= ((t / 32 * 32 + l) % 3 == 0 ? 1u : 0u) << l;
    EXPECT(out[t] == ballot, "ballot of %u", t);
    EXPECT(out[64 + t] == (t < 32 ? 2u : 1u), "any, all of %u", t);
  }
}

__global__ void atomic_kernel(int* count, unsigned long long* bounds, int* seen) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  seen[atomicAdd(count, 1)] = i;
  atomicMin(&bounds[0], static_cast<unsigned long long>(i) + 5);
  atomicMax(&bounds[1], static_cast<unsigned long long>(i) + 5);
}
void atomics() {
  int count = 0;
  unsigned long long bounds[2] = {1000, 0};
  std::vector<int> seen(5 * 96, -1);
  launch(device, "atomic", atomic_kernel, 5, 96, 0, &count, bounds, seen.data());
  std::sort(seen.begin(), seen.end());
  for (int i = 0; i < 480; ++i) EXPECT(seen[i] == i, "slot %d", i);
  EXPECT(count == 480 && bounds[0] == 5 && bounds[1] == 484, "%d", count);
}

void arithmetic() {
  EXPECT(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "popc");
  EXPECT(__ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41, "ffs");
  EXPECT(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63, "clz");
  EXPECT(__brev(1u) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u, "brev");
  EXPECT(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu, "umulhi");
  EXPECT(min(3, 5u) == 3u && max(int64_t{1} << 40, int64_t{2}) == int64_t{1} << 40, "min, max");
  EXPECT(max(NAN, 1.f) == 1.f && min(2.0, 3.0) == 2.0, "min, max of floats");
  EXPECT(sizeof(float4) == 16 && alignof(uint2) == 8 && alignof(double2) == 16, "vectors");
  EXPECT(round_tf32(1.f + 0x1p-11f) == 0x3f802000u && round_tf32(1.f + 0x1p-12f) == 0x3f800000u,
         "round_tf32");
}

// Copies of 16, 10, 4 and 0 bytes; the first group is awaited while the second is under way.
__global__ void cp_async_kernel(const unsigned char* in, unsigned char* out) {
  unsigned char* s = shared_memory() + threadIdx.x * 64;
  const int bytes[] = {16, 10, 4, 0};
  for (int i = 0; i < 4; ++i) {
    cp_async16(s + 16 * i, in + 16 * i, bytes[i]);
    if (i % 2) cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 128 + i] = s[i];
  cp_async_wait<0>();
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 128 + 64 + i] = s[i];
}
void cp_async() {
  Poisoned in(36), out(32 * 128);  // the source ends with its 36 bytes
  auto *from = static_cast<unsigned char*>(in.get()), *to = static_cast<unsigned char*>(out.get());
  for (int i = 0; i < 36; ++i) from[i] = static_cast<unsigned char>(i + 1);
  launch(device, "cp_async", cp_async_kernel, 1, 32, 32 * 64, from, to);
  for (int t = 0; t < 32; ++t)
    for (int i = 0; i < 64; ++i) {
      const int want = i < 16 || (i < 26) || (i >= 32 && i < 36) ? i + 1 : 0;
      EXPECT(to[t * 128 + i] == (i < 32 ? want : 0xff), "byte %d after the first wait", i);
      EXPECT(to[t * 128 + 64 + i] == want, "byte %d after the second wait", i);
    }
}

__global__ void ldmatrix_kernel(uint32_t* out) {
  auto* s = shared_as<uint16_t>();
  for (unsigned i = threadIdx.x; i < 32 * 24; i += 32) s[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, s + threadIdx.x * 24);  // row l begins at element 24 l
  for (int m = 0; m < 4; ++m) out[threadIdx.x * 8 + m] = r[m];
  ldmatrix_x4_trans(r, s + threadIdx.x * 24);
  for (int m = 0; m < 4; ++m) out[threadIdx.x * 8 + 4 + m] = r[m];
}
void ldmatrix() {
  std::vector<uint32_t> out(256);
  launch(device, "ldmatrix", ldmatrix_kernel, 1, 32, 32 * 24 * 2, out.data());
  for (unsigned l = 0; l < 32; ++l)
    for (unsigned m = 0; m < 4; ++m)
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned a = l / 4, b = l % 4 * 2 + i;
        EXPECT((out[l * 8 + m] >> 16 * i & 0xffff) == 24 * (8 * m + a) + b, "lane %u", l);
        EXPECT((out[l * 8 + 4 + m] >> 16 * i & 0xffff) == 24 * (8 * m + b) + a, "trans %u", l);
      }
}

// D = A B + C with the element positions of the PTX manual (sections on the fragments of mma.m16n8k16
// and mma.m16n8k8), element by element.
template <class S>
__global__ void mma_kernel(const S* A, const S* B, float* C) {
  constexpr int k = sizeof(S) == 2 ? 16 : 8, per = 4 / sizeof(S);
  const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
  S a[4 * per], b[2 * per];
  float c[4];
  for (int i = 0; i < 4 * per; ++i) {
    const int row = (per == 2 ? (i < 2 || (i >= 4 && i < 6)) : i % 2 == 0) ? group : group + 8;
    const int col = per == 2 ? thread * 2 + (i & 1) + (i < 4 ? 0 : 8) : thread + (i < 2 ? 0 : 4);
    a[i] = A[row * k + col];
  }
  for (int i = 0; i < 2 * per; ++i) {
    const int row = per == 2 ? thread * 2 + (i & 1) + (i < 2 ? 0 : 8) : thread + 4 * i;
    b[i] = B[row * 8 + group];
  }
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) c[i] = C[at(i)];
  uint32_t ra[4], rb[2];
  memcpy(ra, a, sizeof(ra)), memcpy(rb, b, sizeof(rb));
  if constexpr (sizeof(S) == 2)
    mma(c, ra, rb, S{});
  else
    mma_tf32(c, ra, rb);
  for (int i = 0; i < 4; ++i) C[at(i)] = c[i];
}
template <class S>
void mma_product(DType dtype) {
  const int k = sizeof(S) == 2 ? 16 : 8;
  std::mt19937 random(1);
  std::uniform_int_distribution<int> digit(-9, 9);  // exact in every type
  std::vector<double> a(16 * k), b(k * 8), c(16 * 8);
  for (auto* v : {&a, &b, &c})
    for (double& x : *v) x = digit(random);
  Array A(dtype, a), B(dtype, b), C(DType::f32, c);
  launch(device, "mma", mma_kernel<S>, 1, 32, 0, A.as<S>(), B.as<S>(), C.as<float>());
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int l = 0; l < k; ++l) c[i * 8 + j] += a[i * k + l] * b[l * 8 + j];
  EXPECT(C.values() == c, "mma, k = %d", k);
}

// ---- the machine ---------------------------------------------------------------------------------

__attribute__((noinline)) void touch(volatile int* p, int n) {
  for (int i = 0; i < n; ++i) p[i] = p[i] + i;
}
// Stack and shared memory of one block are the next one's: no race, and NaN again.
__global__ void reuse_kernel(int* out) {
  auto* s = shared_as<uint32_t>();
  const bool fresh = s[threadIdx.x] == 0xffffffffu;
  int local[16] = {};
  touch(local, 16);
  s[threadIdx.x] = static_cast<uint32_t>(local[15]);
  __syncthreads();
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = fresh ? static_cast<int>(block + s[threadIdx.x ^ 1]) : -1;
}
std::vector<int> reuse() {
  std::vector<int> out(3 * 2 * 2 * 64, -1);
  launch(device, "reuse", reuse_kernel, dim3(3, 2, 2), 64, 64 * 4, out.data());
  for (int i = 0; i < static_cast<int>(out.size()); ++i)
    EXPECT(out[i] == i / 64 + 15, "thread %d: %d", i, out[i]);
  return out;
}

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const cuda_on_cpu::Error& e) {
    return e.what();
  }
  return "";
}
void errors() {
  const auto before = cuda_on_cpu::schedule;
  cuda_on_cpu::schedule = {};
  std::vector<float> out(128);
  const auto start = [&](void (*kernel)(float*), int threads) {
    return error_of([&] { launch(device, "k", kernel, dim3(1, 3), threads, 512, out.data()); });
  };
  const std::string e = start(skipped_barrier, 128);
  EXPECT(
      e.find("kernel k, block (0, 0, 0), thread 96: exits while others wait for __syncthreads") ==
          0,
      "%s", e.c_str());
  EXPECT(e.find("test_harness.cpp:") != std::string::npos, "%s", e.c_str());
  EXPECT(start(missing_barrier, 33) != "", "33 threads");
  EXPECT((start(blocks_overlap, 160) != "") == kThread, "160 threads");
  reuse();  // after an error all is as before
  cuda_on_cpu::schedule = before;
}

void schedules() {
  using cuda_on_cpu::Schedule;
  EXPECT((Schedule{Schedule::reverse, 0}.permutation(3, 0) == std::vector<int64_t>{2, 1, 0}),
         "reverse");
  auto p = Schedule{Schedule::random, 1}.permutation(100, 0);
  EXPECT((p == Schedule{Schedule::random, 1}.permutation(100, 0)), "reproducible");
  EXPECT((p != Schedule{Schedule::random, 2}.permutation(100, 0)), "the seed counts");
  std::sort(p.begin(), p.end());
  EXPECT((p == Schedule{}.permutation(100, 0)), "a permutation");
  EXPECT(cuda_on_cpu::same_bits_under_all_schedules(reuse), "reuse");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) return commit_fault(argv[1]);
  shuffles<int>(), shuffles<unsigned>(), shuffles<float>(), shuffles<double>();
  shuffles<int64_t>(), shuffles<uint64_t>();
  votes(), atomics(), arithmetic(), cp_async(), ldmatrix();
  mma_product<bf16>(DType::bf16), mma_product<f16>(DType::f16), mma_product<float>(DType::f32);
  reuse(), errors(), schedules();
  faults_are_caught(argv[0]);
  return failures != 0;
}
