// A minimal test framework for these tests.
#pragma once
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
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

// A random ternary matrix with its packed forms, in memory of exactly their size.
struct Ternary {
  int64_t rows, cols;
  std::vector<double> dense;
  std::vector<uint64_t> bits;
  Planes planes;
  struct OwnedLists {
    std::vector<int64_t> offset;
    std::vector<uint16_t> narrow;
    std::vector<uint32_t> wide;
    AnyLists view(bool as_wide) const {
      return {offset.data(), as_wide ? static_cast<const void*>(wide.data()) : narrow.data(),
              offset.back(), as_wide};
    }
  } by_row, by_column;

  Ternary(int64_t r, int64_t c, double density, unsigned seed, Runtime& rt)
      : Ternary(r, c, drawn(r * c, density, seed), rt) {}

  Ternary(int64_t r, int64_t c, std::vector<double> elements, Runtime& rt)
      : rows(r), cols(c), dense(std::move(elements)), bits(2 * r * words_of(c)) {
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
      l.narrow.resize(l.offset.back());
      l.wide.resize(l.offset.back());
      fill_lists({lists, false, l.narrow.data()}, rt);
      fill_lists({lists, true, l.wide.data()}, rt);
    }
  }

 private:
  static std::vector<double> drawn(int64_t count, double density, unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform;
    std::vector<double> values(count);
    for (double& v : values) {
      const double u = uniform(random);
      v = u < density / 2 ? 1 : u < density ? -1 : 0;
    }
    return values;
  }
};

}  // namespace randlora
