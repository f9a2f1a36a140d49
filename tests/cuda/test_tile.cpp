// csrc/cuda/device/tile.h: every engine, orders and strides of both operands, against a plain
// product.
#include <cstdio>

#include "check.h"
#include "cuda/device/launch.h"
#include "cuda/device/tile.h"
#include "run_tests.h"
#include "test_device.h"

using namespace randlora;

namespace {

// C (warps, 16 MI, 8 NI) = A (warps, 16 MI, k) B (8 NI, k)^T, the operands as they lie in shared
// memory: a warp's A after the other's, then B, which all warps share.
template <class S, int MI, int NI, bool Tf32, Order OA, Order OB, bool Decoded>
__global__ void tile_kernel(const S* operands, int64_t count, int a_size, int a_stride,
                            int b_stride, int k, typename ComputeOf<S>::type* C) {
  S* s = reinterpret_cast<S*>(shared_memory());
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) s[i] = operands[i];
  __syncthreads();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const S *a = s + warp * a_size, *b = s + warps * a_size;
  WarpTile<S, MI, NI, Tf32> tile;
  tile.zero();
  for (int at = 0; at < k; at += tile.kStep) {
    const S* pa = a + (OA == Order::by_line ? at : at * a_stride);
    const S* pb = b + (OB == Order::by_line ? at : at * b_stride);
    if constexpr (Decoded) {  // fragments from the layout in ptx.h
      uint32_t fa[MI][4];
      const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
      for (int m = 0; m < MI; ++m)
        for (int h = 0; h < 4; ++h) {
          const S* row = pa + (16 * m + g + h % 2 * 8) * a_stride + 2 * q + h / 2 * 8;
          fa[m][h] = pack<S>(widen(row[0]), widen(row[1]));
        }
      tile.template step_with<OB>(fa, pb, b_stride);
    } else {
      tile.template step<OA, OB>(pa, a_stride, pb, b_stride);
    }
  }
  for (int m = 0; m < MI; ++m)
    for (int n = 0; n < NI; ++n)
      for (int e = 0; e < 4; ++e)
        C[(warp * 16 * MI + tile.row(m, e)) * 8 * NI + tile.col(n, e)] = tile.acc[m][n][e];
}

template <class S, int MI, int NI, bool Tf32, Order OA, Order OB, bool Decoded = false>
void check(DType dtype, int extra) {
  constexpr int M = 16 * MI, N = 8 * NI, k = 48, warps = 3;
  const int a_stride = (OA == Order::by_line ? k : M) + extra;
  const int b_stride = (OB == Order::by_line ? k : N) + extra;
  const auto size = [&](Order order, int lines, int stride) {
    const int full = (order == Order::by_line ? lines : k) * stride;
    return (full + 7) / 8 * 8;  // the next operand is aligned again
  };
  const int a_size = size(OA, M, a_stride), b_size = size(OB, N, b_stride);
  std::vector<double> values(warps * a_size + b_size, NAN);  // what lies between is not read
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const auto at = [](Order order, int line, int i, int stride) {
    return order == Order::by_line ? line * stride + i : i * stride + line;
  };
  for (int w = 0; w < warps; ++w)
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < k; ++i) values[w * a_size + at(OA, m, i, a_stride)] = normal(random);
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < k; ++i) values[warps * a_size + at(OB, n, i, b_stride)] = normal(random);
  values = rounded(dtype, values);
  std::vector<double> want(warps * M * N);
  for (int w = 0; w < warps; ++w)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < k; ++i)
          want[(w * M + m) * N + n] += values[w * a_size + at(OA, m, i, a_stride)] *
                                       values[warps * a_size + at(OB, n, i, b_stride)];
  TestDevice device;
  Array operands(dtype, values), C(compute_of(dtype), warps * M * N);
  launch(device, "tile", tile_kernel<S, MI, NI, Tf32, OA, OB, Decoded>, 1, 32 * warps,
         operands.bytes(), operands.as<S>(), operands.count(), a_size, a_stride, b_stride, k,
         C.as<typename ComputeOf<S>::type>());
  // 16-bit inputs are exact by now: only sums round, so all but tf32 keep to the compute type's rule.
  const double error = relative_error(C.values(), want);
  EXPECT(error <= tolerance(compute_of(dtype), Tf32), "%d x %d, orders %d %d, stride %d: %g", M, N,
         int(OA), int(OB), a_stride, error);
}

template <class S, int MI, int NI, bool Tf32 = false>
void check_orders(DType dtype, std::initializer_list<int> extras) {
  constexpr Order line = Order::by_line, by_k = Order::by_k;
  for (int extra : extras) {
    check<S, MI, NI, Tf32, line, line>(dtype, extra);
    check<S, MI, NI, Tf32, line, by_k>(dtype, extra);
    check<S, MI, NI, Tf32, by_k, line>(dtype, extra);
    check<S, MI, NI, Tf32, by_k, by_k>(dtype, extra);
    if constexpr (sizeof(S) == 2) {
      check<S, MI, NI, Tf32, line, line, true>(dtype, extra);
      check<S, MI, NI, Tf32, line, by_k, true>(dtype, extra);
    }
  }
}

void tests() {
  check_orders<bf16, 1, 2>(DType::bf16, {0, 8});
  check_orders<bf16, 2, 4>(DType::bf16, {24});
  check_orders<f16, 2, 2>(DType::f16, {0, 8, 56});
  check_orders<float, 1, 1>(DType::f32, {0, 1, 3});
  check_orders<float, 2, 3>(DType::f32, {0, 5});
  check_orders<float, 1, 1, true>(DType::f32, {0, 1});
  check_orders<float, 2, 3, true>(DType::f32, {0, 5});
  check_orders<double, 1, 2>(DType::f64, {0, 1});
  check_orders<double, 2, 1>(DType::f64, {3});
}

}  // namespace

int main() { return run_tests(tests); }
