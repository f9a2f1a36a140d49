// Round trip dense -> planes -> lists -> dense, by row and by column, for odd sizes.
#include <cmath>

#include "check.h"
#include "thread_runtime.h"

using namespace randlora;

static void round_trip(int64_t rows, int64_t cols, double density, int threads) {
  ThreadRuntime rt(threads);
  const Ternary t(rows, cols, density, unsigned(rows * 7 + cols), rt);
  std::vector<double> out(rows * cols, 9.0);
  planes_to_dense(t.planes, rows, cols, 1.0, out.data(), DType::f64, rt);
  EXPECT(out == t.dense, "planes (%ld, %ld) at %g", long(rows), long(cols), density);
  for (bool wide : {false, true}) {
    std::fill(out.begin(), out.end(), 9.0);
    lists_to_dense(t.by_row.view(wide), rows, cols, 1.0, out.data(), DType::f64, rt);
    EXPECT(out == t.dense, "lists by row, wide = %d", wide);
    std::vector<double> turned(rows * cols, 9.0);
    lists_to_dense(t.by_column.view(wide), cols, rows, 1.0, turned.data(), DType::f64, rt);
    bool equal = true;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) equal &= turned[j * rows + i] == t.dense[i * cols + j];
    EXPECT(equal, "lists by column, wide = %d", wide);
  }
  for (const auto* lists : {&t.by_row, &t.by_column})
    for (size_t q = 0; q + 1 < lists->offset.size(); ++q)
      for (int64_t p = lists->offset[q]; p + 1 < lists->offset[q + 1]; ++p)
        EXPECT(lists->narrow[p] < lists->narrow[p + 1], "run %zu is not sorted", q);
}

static void not_ternary() {
  ThreadRuntime rt(2);
  std::vector<float> m = {0.f, .5f, -.5f, 0.f, .5f, .25f};
  std::vector<uint64_t> bits(4);
  int64_t bad = -1;
  EXPECT(pack_dense(m.data(), DType::f32, 2, 3, bits.data(), bits.data() + 2, &bad, rt) < 0,
         "accepted");
  EXPECT(bad == 5, "bad element %ld", long(bad));
  m[5] = -.5f;
  EXPECT(pack_dense(m.data(), DType::f32, 2, 3, bits.data(), bits.data() + 2, &bad, rt) == .5,
         "refused");
  m[0] = NAN;
  EXPECT(pack_dense(m.data(), DType::f32, 2, 3, bits.data(), bits.data() + 2, &bad, rt) < 0, "NaN");
}

int main() {
  for (int threads : {1, 3})
    for (double density : {0.0, 0.02, 1.0 / 3, 1.0})
      for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {3, 64}, {64, 3}, {65, 130}, {130, 65}, {7, 1000}, {200, 77}})
        round_trip(rows, cols, density, threads);
  not_ternary();
  return finish();
}
