// Tests of the execution gate itself: what the kernels' own tests would not show to be wrong, such
// as where the lanes of a fragment are. test_faults.cpp has what must not go unseen.
#include "check.h"
#include "cuda/device/launch.h"
#include "cuda/device/ptx.h"
#include "test_device.h"

using namespace randlora;

namespace {

TestDevice device;

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

void tests() {
  EXPECT(round_tf32(1.f + 0x1p-11f) == 0x3f802000u && round_tf32(1.f + 0x1p-12f) == 0x3f800000u,
         "round_tf32");
  ldmatrix();
  mma_product<bf16>(DType::bf16), mma_product<f16>(DType::f16), mma_product<float>(DType::f32);
}

}  // namespace

int main() { return run_tests(tests); }
