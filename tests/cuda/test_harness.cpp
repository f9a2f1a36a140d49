// Tests of the execution gate itself: what the kernels' own tests would not show to be wrong, such
// as where the lanes of a fragment are. test_faults.cpp has what must not go unseen.
#include "check.h"
#include "cuda/device/launch.h"
#include "cuda/device/ptx.h"
#include "test_device.h"

using namespace randlora;

namespace {

// ---- primitives ---------------------------------------------------------------------------------

TestDevice device;

// Which lane the programming guide says each shuffle reads.
int source_lane(int mode, int l, int by) {
  if (mode == 0) return by;
  if (mode == 1) return l < by ? l : l - by;
  return l ^ by;
}
__global__ void shuffle_kernel(double* out, int mode, int by) {
  const double v = 3.0 * threadIdx.x;
  out[threadIdx.x] = mode == 0   ? __shfl_sync(kWarp, v, by)
                     : mode == 1 ? __shfl_up_sync(kWarp, v, by)
                                 : __shfl_xor_sync(kWarp, v, by);
}
void shuffles() {
  for (int mode = 0; mode < 3; ++mode)
    for (int by = 0; by < 32; by += 3) {
      std::vector<double> out(64);
      launch(device, "shuffle", shuffle_kernel, 1, 64, 0, out.data(), mode, by);
      for (int t = 0; t < 64; ++t)
        EXPECT(out[t] == 3 * (t / 32 * 32 + source_lane(mode, t % 32, by)),
               "mode %d, by %d, thread %d", mode, by, t);
    }
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
  auto* s = reinterpret_cast<uint16_t*>(shared_memory());
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

// D = A B + C with the element positions of the PTX manual (fragments of mma.m16n8k16 and
// mma.m16n8k8), element by element.
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

// ---- the machine --------------------------------------------------------------------------------

__attribute__((noinline)) void touch(volatile int* p, int n) {
  for (int i = 0; i < n; ++i) p[i] = p[i] + i;
}
// Stack and shared memory of one block are the next one's: no race, and NaN again.
__global__ void reuse_kernel(int* out) {
  auto* s = reinterpret_cast<uint32_t*>(shared_memory());
  const bool fresh = s[threadIdx.x] == 0xffffffffu;
  int local[16] = {};
  touch(local, 16);
  s[threadIdx.x] = static_cast<uint32_t>(local[15]);
  __syncthreads();
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = fresh ? static_cast<int>(block + s[threadIdx.x ^ 1]) : -1;
}
void reuse() {
  std::vector<int> out(3 * 2 * 2 * 64, -1);
  launch(device, "reuse", reuse_kernel, {3, 2, 2}, 64, 64 * 4, out.data());
  for (int i = 0; i < static_cast<int>(out.size()); ++i)
    EXPECT(out[i] == i / 64 + 15, "thread %d: %d", i, out[i]);
}

void tests() {
  EXPECT(round_tf32(1.f + 0x1p-11f) == 0x3f802000u && round_tf32(1.f + 0x1p-12f) == 0x3f800000u,
         "round_tf32");
  shuffles(), cp_async(), ldmatrix(), reuse();
  mma_product<bf16>(DType::bf16), mma_product<f16>(DType::f16), mma_product<float>(DType::f32);
}

}  // namespace

int main() { return run_tests(tests); }
