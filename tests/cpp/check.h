// A minimal test framework, the Runtime of the tests, and random ternary matrices.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/operators.h"
#include "cpu/dispatch.h"

namespace randlora {

inline int failures = 0;
inline std::string where;  // the case that runs; EXPECT prints it

template <class... Numbers>
void set_case(const char* format, Numbers... numbers) {
  char text[256];
  std::snprintf(text, sizeof text, format, numbers...);
  where = text;
}
inline int finish() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      ++::randlora::failures;                                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf(" %s\n", ::randlora::where.c_str());            \
    }                                                             \
  } while (0)

// Memory of exactly this size, 256-byte aligned (or `shift` bytes past that), all bits set: NaN in
// every dtype. ASan sees its ends.
class Poisoned {
 public:
  explicit Poisoned(int64_t bytes, int64_t shift = 0) : shift_(shift) {
    const size_t size = static_cast<size_t>(bytes + shift);
    if (posix_memalign(&memory_, 256, size)) throw std::bad_alloc();
    std::memset(memory_, 0xff, size);
  }
  ~Poisoned() { std::free(memory_); }
  Poisoned(const Poisoned&) = delete;
  Poisoned& operator=(const Poisoned&) = delete;
  void* get() const { return static_cast<char*>(memory_) + shift_; }

 private:
  void* memory_ = nullptr;
  int64_t shift_;
};

// One std::thread per slot, and poisoned scratch, so that reads of unwritten memory show.
class ThreadRuntime : public Runtime {
 public:
  explicit ThreadRuntime(int threads) : threads_(threads) {}
  int threads() const override { return threads_; }
  void run(int slots, void (*task)(void*, int), void* arg) override {
    std::vector<std::thread> pool;
    for (int s = 1; s < slots; ++s) pool.emplace_back(task, arg, s);
    if (slots > 0) task(arg, 0);
    for (std::thread& t : pool) t.join();
  }
  void* scratch(size_t bytes) override {
    held_.emplace_back(new Poisoned(static_cast<int64_t>((bytes + 63) / 64 * 64 + 64)));
    return held_.back()->get();
  }

 private:
  int threads_;
  std::vector<std::unique_ptr<Poisoned>> held_;
};

// The set of kernels that RANDLORA_ISA names.
struct CpuKernels {
  static constexpr int64_t kBehind = 64;  // z, w and lambda of Hadamard bases have a vector more
  ThreadRuntime runtime;
  explicit CpuKernels(int threads) : runtime(threads) {}
  std::string settings() const { return "threads " + std::to_string(runtime.threads()); }
#define RANDLORA_CALL(name, Operator) \
  void name(const Operator& p) { cpu_kernels().name(p, runtime); }
  RANDLORA_OPERATORS(RANDLORA_CALL)
#undef RANDLORA_CALL
};

// False where the set cannot run: the test exits with 77, which CTest takes for skipped.
inline bool kernels_can_run() {
  try {
    std::printf("kernels: %s\n", cpu_kernels().isa);
    return true;
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return false;
  }
}

// A random ternary matrix with its packed forms, in memory of exactly their size.
struct Ternary {
  int64_t rows, cols;
  std::vector<double> dense;
  std::vector<uint64_t> bits;
  Planes planes;
  struct OwnedLists {
    std::vector<int64_t> offset;
    std::vector<uint16_t> index;
    Lists view() const { return {offset.data(), index.data(), offset.back()}; }
  } by_row, by_column;

  Ternary(int64_t r, int64_t c, double density, unsigned seed, Runtime& rt)
      : rows(r), cols(c), dense(r * c), bits(2 * r * words_of(c)) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform;
    for (double& v : dense) {
      const double u = uniform(random);
      v = u < density / 2 ? 1 : u < density ? -1 : 0;
    }
    PackReport report;
    pack_dense({dense.data(), DType::f64, rows, cols, bits.data(),
                bits.data() + rows * words_of(cols), &report},
               rt);
    planes = {bits.data(), bits.data() + rows * words_of(cols), words_of(cols)};
    for (bool column : {false, true}) {
      OwnedLists& l = column ? by_column : by_row;
      l.offset.resize(2 * (column ? cols : rows) + 1);
      const CountLists lists{planes, rows, cols, column, l.offset.data()};
      count_lists(lists, rt);
      l.index.resize(l.offset.back());
      fill_lists({lists, l.index.data()}, rt);
    }
  }
};

}  // namespace randlora
