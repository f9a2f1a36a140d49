// Generation, lists and expansion on the card: bit for bit the CPU's.
#include "core/ternary_spec.h"
#include "test_device.h"

using namespace randlora;

namespace {

using Words = std::vector<uint64_t>;  // both planes, as they lie in memory
using Shapes = std::vector<std::pair<int64_t, int64_t>>;

std::vector<int> block_sizes() {
  return cuda_on_cpu::kThreadSanitizer ? std::vector<int>{32, 128} : std::vector<int>{32, 128, 256};
}

void generation() {
  ThreadRuntime rt(1);
  for (int threads : block_sizes())
    for (auto [rows, cols] : Shapes{{1, 1}, {3, 64}, {2, 65}, {33, 63}, {5, 130}, {1, 1000}})
      for (int64_t col : {int64_t{0}, int64_t{64}, int64_t{1}, int64_t{63}, int64_t{100}})
        for (double density : {0.05, 1.0 / 3, 1.0}) {
          const int64_t words = rows * words_of(cols);
          Words want(2 * words), got(2 * words, ~uint64_t{0});
          FillPlanes call{
              0x123456789abcdef0u, kRoleB, threshold(density), 7, rows, col, cols, want.data(),
              want.data() + words};
          cpu_kernels().fill_planes(call, rt);
          call.plus = got.data(), call.minus = got.data() + words;
          TestDevice(threads).fill_planes(call);
          EXPECT(got == want, "planes (%ld, %ld) from column %ld at %g", long(rows), long(cols),
                 long(col), density);
        }
}

void lists(int64_t rows, int64_t cols, double density, int threads) {
  ThreadRuntime rt(1);
  const Ternary t(rows, cols, density, unsigned(rows * 7 + cols), rt);
  for (const bool by_column : {false, true}) {
    TestDevice device(threads);
    const auto& want = by_column ? t.by_column : t.by_row;
    std::vector<int64_t> offset(want.offset.size(), -1);
    const CountLists call{t.planes, rows, cols, by_column, offset.data()};
    device.count_lists(call);
    std::vector<uint16_t> index(want.index.size(), 0xffff);
    device.fill_lists({call, index.data()});
    EXPECT(offset == want.offset && index == want.index,
           "lists (%ld, %ld) at %g, by_column %d, threads %d", long(rows), long(cols), density,
           by_column, threads);
  }
}

// Planes to dense, `skip` elements past an aligned address.
void dense(int64_t rows, int64_t cols, double density, DType dtype, int threads, int64_t skip) {
  ThreadRuntime rt(3);
  const Ternary t(rows, cols, density, unsigned(rows * 5 + cols), rt);
  const double value = 1 / std::sqrt(0.07);
  Array want(dtype, rows * cols);
  planes_to_dense({t.planes, rows, cols, value, want.get(), dtype}, rt);
  TestDevice device(threads);
  const Array out(dtype, rows * cols, skip);
  device.planes_to_dense({t.planes, rows, cols, value, out.get(), dtype});
  EXPECT(out.raw() == want.raw(), "planes (%ld, %ld) to dtype %d, threads %d", long(rows),
         long(cols), int(dtype), threads);
}

void few() { lists(20, 300, 1.0 / 3, 64); }

void tests() {
  generation();
  // Most of ThreadSanitizer's time goes into starting threads, so it sees fewer rows and columns.
  const bool quick = cuda_on_cpu::kThreadSanitizer;
  for (auto [rows, cols] : quick
                               ? Shapes{{3, 64}, {65, 70}}
                               : Shapes{{1, 1}, {64, 3}, {65, 130}, {130, 65}, {7, 600}, {257, 70}})
    for (double density :
         quick ? std::vector<double>{1.0 / 3} : std::vector<double>{0.0, 0.05, 1.0 / 3, 1.0})
      lists(rows, cols, density, 128);
  for (int threads : block_sizes()) lists(20, 64, 1.0 / 3, threads);
  lists(3, 2100, 0.05, 32);                 // several words a lane by row
  lists(quick ? 100 : 500, 3, 0.05, 32);    // several tiles of the scan
  if (!quick) lists(3, 65536, 0.001, 128);  // the last position of 16 bits
  for (auto [rows, cols] : quick ? Shapes{{3, 64}, {5, 130}, {2, 1000}}
                                 : Shapes{{1, 1}, {3, 64}, {33, 3}, {5, 130}, {2, 1000}, {9, 264}})
    for (DType dtype : kTypes)
      for (double density : {0.0, 0.05, 1.0})
        for (int64_t skip : {0, 1}) dense(rows, cols, density, dtype, skip ? 32 : 128, skip);
}

}  // namespace

int main() { return run_tests(tests, few); }
