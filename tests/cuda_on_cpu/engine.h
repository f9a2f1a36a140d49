// What a kernel sees of the machine that runs it: its place in the grid, and the calls that wait
// for other threads. engine.cpp implements them, and is compiled once, not with every kernel.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

// Hides a function from the sanitizers. It must not pass hidden memory to code that they see.
#define CUDA_ON_CPU_UNSEEN \
  __attribute__((no_sanitize("thread"), no_sanitize("address"), no_sanitize("undefined")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;  // set whenever the scheduler switches
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif
constexpr bool kSanitized = kThreadSanitizer || kAddressSanitizer;

struct Error : std::runtime_error {  // the kernel breaks a rule of CUDA
  using std::runtime_error::runtime_error;
};

// The function that a thread calls, and its place in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
};
void require(bool holds, const Site& site, const char* what);

inline int lane() { return static_cast<int>(threadIdx.x % 32); }
unsigned char* shared();
size_t shared_bytes();

void barrier(Site site);
// The lanes of the mask meet; the last to arrive computes for all from their operands. Only
// __syncwarp orders memory.
using Compute = void (*)(void* const* operand, unsigned mask);
void collective(Site site, unsigned mask, void* operand, Compute compute,
                bool orders_memory = false);
// Of a lane outside the warp, the calling lane's own value.
uint64_t shuffle(Site site, unsigned mask, uint64_t value, int source);
unsigned vote(Site site, unsigned mask, bool yes);

// cp.async: copies that the thread has issued and not awaited. A push is false if there are too
// many, a pop if the groups but the last `pending` are delivered.
bool push_copy(void* to, const uint64_t* data);
bool pop_copy(int pending, void** to, uint64_t* data);
void commit_copies();

// Writes, once per kernel, the file with its code and the position there to the file named by
// CUDA_ON_CPU_KERNELS, for tools/cuda/every_kernel.py.
void note_start(const void* kernel);
// Appends each launch, and how many thread blocks it has along x, to the file named by
// CUDA_ON_CPU_LAUNCHES, for tests/gpu.
void note_launch(const char* kernel, unsigned blocks);

// Each thread runs body(); a block may have up to shared_limit bytes of shared memory.
void run_grid(const char* kernel, dim3 grid, int threads, int64_t shared_bytes,
              int64_t shared_limit, void (*body)(const void*), const void* argument);
template <class F>
void run(const char* kernel, dim3 grid, int threads, int64_t shared_bytes, int64_t shared_limit,
         const F& body) {
  run_grid(
      kernel, grid, threads, shared_bytes, shared_limit,
      [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

}  // namespace cuda_on_cpu
