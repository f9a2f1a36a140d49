// Generation, packing and expansion on the card: bit for bit the CPU's.
#include <cmath>
#include <string>

#include "check.h"
#include "core/ternary_spec.h"
#include "cpu/dispatch.h"
#include "cuda/kernels.h"
#include "run_tests.h"
#include "test_device.h"
#include "thread_runtime.h"

using namespace randlora;

namespace {

using Words = std::vector<uint64_t>;  // both planes, as they lie in memory

// Memory of exactly `count` elements; a copy of `values`, or poisoned.
template <class T>
struct Exact {
  int64_t count;
  Poisoned memory;
  explicit Exact(int64_t n) : count(n), memory(n * int64_t(sizeof(T))) {}
  explicit Exact(const std::vector<T>& values) : Exact(int64_t(values.size())) {
    if (count) std::memcpy(memory.get(), values.data(), values.size() * sizeof(T));
  }
  T* get() const { return static_cast<T*>(memory.get()); }
  std::vector<T> values() const { return {get(), get() + count}; }
};

TestDevice device_with(int threads) {
  TestDevice device;
  device.max_threads = threads;
  return device;
}
std::vector<int> block_sizes() {
  return cuda_on_cpu::kThreadSanitizer ? std::vector<int>{32, 128} : std::vector<int>{32, 128, 256};
}

Planes view(const uint64_t* words, int64_t rows, int64_t cols) {
  return {words, words + rows * words_of(cols), words_of(cols)};
}

struct Slice {
  uint64_t seed;
  uint32_t role;
  int64_t row, col, rows, cols;
  uint32_t threshold;
  FillPlanes into(uint64_t* words) const {
    return {seed, role, threshold, row, rows, col, cols, words, words + rows * words_of(cols)};
  }
};

Words generate(const Slice& s, Device& device) {
  const Exact<uint64_t> words(2 * s.rows * words_of(s.cols));
  cuda::fill_planes(s.into(words.get()), device);
  return words.values();
}

struct Packed {
  std::vector<int64_t> offset;
  std::vector<uint32_t> index;
};

Packed pack(const Words& words, int64_t rows, int64_t cols, bool by_column, bool wide,
            Device& device) {
  const Exact<uint64_t> in(words);
  const Exact<int64_t> offset(2 * (by_column ? cols : rows) + 1);
  const Planes planes = view(in.get(), rows, cols);
  const int64_t total = cuda::count_lists(planes, rows, cols, by_column, offset.get(), device);
  Packed packed{offset.values(), {}};
  if (total != packed.offset.back()) return {};
  if (wide) {
    const Exact<uint32_t> index(total);
    cuda::fill_lists(planes, rows, cols, by_column, offset.get(), true, index.get(), device);
    packed.index = index.values();
  } else {
    const Exact<uint16_t> index(total);
    cuda::fill_lists(planes, rows, cols, by_column, offset.get(), false, index.get(), device);
    packed.index.assign(index.get(), index.get() + total);
  }
  return packed;
}

// ---- against the CPU ----------------------------------------------------------------------------

void generation() {
  ThreadRuntime rt(1);
  for (int threads : block_sizes())
    for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {3, 64}, {2, 65}, {33, 63}, {5, 130}, {1, 1000}})
      for (int64_t col : {int64_t{0}, int64_t{64}, int64_t{1}, int64_t{63}, int64_t{100}})
        for (double density : {0.05, 1.0 / 3, 1.0}) {
          TestDevice device = device_with(threads);
          const Slice s{0x123456789abcdef0u, kRoleB, 7, col, rows, cols, threshold(density)};
          Words want(2 * rows * words_of(cols));
          cpu_kernels().fill_planes(s.into(want.data()), rt);
          EXPECT(generate(s, device) == want, "planes (%ld, %ld) from column %ld at %g", long(rows),
                 long(cols), long(col), density);
        }
}

void lists(int64_t rows, int64_t cols, double density, int threads) {
  ThreadRuntime rt(1);
  const Ternary t(rows, cols, density, unsigned(rows * 7 + cols), rt);
  for (bool by_column : {false, true})
    for (bool wide : {false, true}) {
      if (cols > 65536 && (by_column || !wide)) continue;
      TestDevice device = device_with(threads);
      const auto& want = by_column ? t.by_column : t.by_row;
      const Packed got = pack(t.bits, rows, cols, by_column, wide, device);
      EXPECT(got.offset == want.offset, "offsets (%ld, %ld) at %g, by_column %d, threads %d",
             long(rows), long(cols), density, by_column, threads);
      EXPECT(got.index == std::vector<uint32_t>(want.wide.begin(), want.wide.end() - 1),
             "positions (%ld, %ld) at %g, by_column %d, wide %d, threads %d", long(rows),
             long(cols), density, by_column, wide, threads);
    }
}

// Planes and lists to dense and back, `skip` elements past an aligned address.
void dense(int64_t rows, int64_t cols, double density, DType dtype, int threads, int64_t skip) {
  ThreadRuntime rt(1);
  const Ternary t(rows, cols, density, unsigned(rows * 5 + cols), rt);
  const double value = 1 / std::sqrt(0.07);
  Array want(dtype, rows * cols);
  planes_to_dense(t.planes, rows, cols, value, want.get(), dtype, rt);
  TestDevice device = device_with(threads);
  const Array out(dtype, rows * cols, skip);
  const Exact<uint64_t> bits(t.bits);
  cuda::planes_to_dense(view(bits.get(), rows, cols), rows, cols, value, out.get(), dtype, device);
  EXPECT(out.raw() == want.raw(), "planes (%ld, %ld) to dtype %d, threads %d", long(rows),
         long(cols), int(dtype), threads);
  for (bool wide : {false, true}) {
    const Array spread(dtype, rows * cols, skip);
    cuda::lists_to_dense(t.by_row.view(wide), wide, rows, cols, value, spread.get(), dtype, device);
    EXPECT(spread.raw() == want.raw(), "lists (%ld, %ld) to dtype %d, wide %d, threads %d",
           long(rows), long(cols), int(dtype), wide, threads);
  }
  const Exact<uint64_t> again(int64_t(t.bits.size()));
  const Exact<double> found(2);
  cuda::pack_dense(out.get(), dtype, rows, cols, again.get(), again.get() + rows * words_of(cols),
                   found.get(), device);
  const bool empty = t.by_row.offset.back() == 0;
  const double a = rounded(dtype, {value})[0];
  EXPECT(again.values() == t.bits, "packed (%ld, %ld) of dtype %d", long(rows), long(cols),
         int(dtype));
  EXPECT(found.get()[0] == (empty ? 0 : a) && found.get()[1] == -1, "found %g, %g", found.get()[0],
         found.get()[1]);
}

// Whatever is not ternary is told as the CPU tells it, and leaves the same planes.
void not_ternary() {
  const double a = 0.5, inf = INFINITY;
  const int64_t rows = 3, cols = 70;
  const auto with = [&](std::vector<std::pair<int, double>> elements) {
    std::vector<double> m(rows * cols, 0.0);
    for (auto [e, v] : elements) m[e] = v;
    return m;
  };
  for (const std::vector<double>& m :
       {with({}), with({{0, a}}), with({{209, -a}}), with({{0, -0.0}, {7, -a}, {100, a}}),
        with({{3, a}, {209, 0.25}}), with({{3, a}, {150, 1.0}, {80, 0.25}, {81, 0.25}}),
        with({{0, NAN}}), with({{5, NAN}, {6, a}}), with({{5, a}, {190, NAN}}), with({{40, inf}}),
        with({{40, inf}, {41, -inf}}), with({{40, -inf}, {139, a}}), with({{4, a}, {66, inf}}),
        with({{69, a}, {70, a}, {139, -a}})})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      ThreadRuntime rt(1);
      TestDevice device;
      const Array x(dtype, m);
      Words want(2 * rows * words_of(cols));
      int64_t bad = -2;
      const double value = pack_dense(x.get(), dtype, rows, cols, want.data(),
                                      want.data() + rows * words_of(cols), &bad, rt);
      const Exact<uint64_t> words(int64_t(want.size()));
      const Exact<double> found(2);
      cuda::pack_dense(x.get(), dtype, rows, cols, words.get(), words.get() + rows * words_of(cols),
                       found.get(), device);
      EXPECT(found.get()[0] == value && found.get()[1] == double(bad),
             "found %g, %g instead of %g, %ld", found.get()[0], found.get()[1], value, long(bad));
      EXPECT(words.values() == want, "planes of a matrix with value %g, bad %ld", value, long(bad));
    }
}

// A first element that is far away: the search takes several steps.
void late_magnitude() {
  TestDevice device = device_with(32);
  std::vector<double> m(40 * 50, 0.0);
  m[1999] = -3;
  const Array x(DType::f32, m);
  const Exact<uint64_t> words(2 * 40);
  const Exact<double> found(2);
  cuda::pack_dense(x.get(), DType::f32, 40, 50, words.get(), words.get() + 40, found.get(), device);
  EXPECT(found.get()[0] == 3 && words.get()[79] == uint64_t{1} << 49, "%g", found.get()[0]);
}

void schedules() {
  ThreadRuntime rt(1);
  const Ternary t(20, 300, 1.0 / 3, 1, rt);
  const bool same = cuda_on_cpu::same_bits_under_all_schedules([&] {
    TestDevice device = device_with(64);
    std::vector<int64_t> all;
    for (bool by_column : {false, true}) {
      const Packed p = pack(t.bits, t.rows, t.cols, by_column, false, device);
      all.insert(all.end(), p.offset.begin(), p.offset.end());
      all.insert(all.end(), p.index.begin(), p.index.end());
    }
    std::vector<double> values = t.dense;
    values[3000] = values[5000] = 0.25;
    const Array x(DType::bf16, values);
    const Exact<uint64_t> words(int64_t(t.bits.size()));
    const Exact<double> found(2);
    cuda::pack_dense(x.get(), DType::bf16, t.rows, t.cols, words.get(),
                     words.get() + t.rows * words_of(t.cols), found.get(), device);
    all.push_back(int64_t(found.get()[1]));
    return all;
  });
  EXPECT(same, "the order of threads shows");
}

void tests() {
  generation();
  // Most of ThreadSanitizer's time goes into starting threads, so it sees fewer rows and columns.
  using Shapes = std::vector<std::pair<int64_t, int64_t>>;
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
  if (!quick) lists(3, 70000, 0.001, 128);  // positions beyond 16 bits
  for (auto [rows, cols] : quick ? Shapes{{3, 64}, {5, 130}, {2, 1000}}
                                 : Shapes{{1, 1}, {3, 64}, {33, 3}, {5, 130}, {2, 1000}, {9, 264}})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
      for (double density : {0.0, 0.05, 1.0})
        for (int64_t skip : {0, 1}) dense(rows, cols, density, dtype, skip ? 32 : 128, skip);
  not_ternary();
  late_magnitude();
  schedules();
}

}  // namespace

int main() { return run_tests(tests); }
