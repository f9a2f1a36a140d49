#include "packing.h"

#include <cmath>
#include <cstring>
#include <vector>

#define RANDLORA_ISA packing
#define RANDLORA_VECTOR_BYTES 16
#include "simd.h"

namespace randlora {
namespace {

using packing::narrow;
using packing::widen;
using packing::with_dtype;

// fn(line, plus word, minus word, base) for every word of every line in [begin, end).
template <class F>
void each_word(const Planes& p, int64_t rows, bool by_column, int64_t begin, int64_t end,
               const F& fn) {
  if (!by_column) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t w = 0; w < p.words; ++w)
        fn(row, p.plus[row * p.words + w], p.minus[row * p.words + w], w * 64);
    return;
  }
  for (int64_t word = begin / 64; word * 64 < end; ++word)
    for (int64_t first = 0; first < rows; first += 64) {
      uint64_t plus[64], minus[64];
      for (int64_t q = 0; q < 64; ++q) {
        const bool inside = first + q < rows;
        plus[q] = inside ? p.plus[(first + q) * p.words + word] : 0;
        minus[q] = inside ? p.minus[(first + q) * p.words + word] : 0;
      }
      transpose_64x64(plus);
      transpose_64x64(minus);
      for (int64_t c = word * 64; c < end && c < word * 64 + 64; ++c)
        fn(c, plus[c & 63], minus[c & 63], first);
    }
}

template <class Index>
Index* put(uint64_t m, int64_t base, Index* at) {
  for (; m; m &= m - 1) *at++ = static_cast<Index>(base + __builtin_ctzll(m));
  return at;
}

}  // namespace

double pack_dense(const void* dense, DType dtype, int64_t rows, int64_t cols, uint64_t* plus,
                  uint64_t* minus, int64_t* bad, Runtime& rt) {
  double value = -1;
  with_dtype(dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(dense);
    const int64_t count = rows * cols, words = words_of(cols);
    double a = 0;
    for (int64_t e = 0; e < count && a == 0; ++e) a = std::fabs(double(widen(x[e])));
    std::vector<int64_t> first_bad(rows, -1);
    rt.split(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t w = 0; w < words; ++w) {
          uint64_t p = 0, m = 0, other = 0;
          const int64_t here = cols - w * 64 < 64 ? cols - w * 64 : 64;
          for (int64_t b = 0; b < here; ++b) {
            const double v = widen(x[row * cols + w * 64 + b]);
            const bool is_plus = v == a && a != 0, is_minus = v == -a && a != 0;
            p |= uint64_t{is_plus} << b;
            m |= uint64_t{is_minus} << b;
            other |= uint64_t{!(is_plus || is_minus || v == 0)} << b;
          }
          plus[row * words + w] = p;
          minus[row * words + w] = m;
          if (other && first_bad[row] < 0)
            first_bad[row] = row * cols + w * 64 + __builtin_ctzll(other);
        }
    });
    // Reports the first bad element, else 0 if a is infinite: the same for any thread count.
    *bad = -1;
    for (int64_t row = 0; row < rows && *bad < 0; ++row) *bad = first_bad[row];
    if (*bad < 0 && std::isfinite(a)) value = a;
    if (*bad < 0 && !std::isfinite(a)) *bad = 0;
  });
  return value;
}

int64_t count_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                    int64_t* offset, Runtime& rt) {
  const int64_t lines = by_column ? cols : rows;
  std::memset(offset, 0, size_t(2 * lines + 1) * sizeof(int64_t));
  rt.split(lines, 64, [&](int64_t begin, int64_t end) {
    each_word(planes, rows, by_column, begin, end,
              [&](int64_t line, uint64_t plus, uint64_t minus, int64_t) {
                offset[2 * line + 1] += __builtin_popcountll(plus);
                offset[2 * line + 2] += __builtin_popcountll(minus);
              });
  });
  for (int64_t q = 0; q < 2 * lines; ++q) offset[q + 1] += offset[q];
  return offset[2 * lines];
}

void fill_lists(const Planes& planes, int64_t rows, int64_t cols, bool by_column,
                const int64_t* offset, bool wide, void* index, Runtime& rt) {
  const int64_t lines = by_column ? cols : rows;
  std::vector<int64_t> next(offset, offset + 2 * lines);
  const auto fill = [&](auto* to) {
    rt.split(lines, 64, [&](int64_t begin, int64_t end) {
      each_word(planes, rows, by_column, begin, end,
                [&](int64_t line, uint64_t plus, uint64_t minus, int64_t base) {
                  next[2 * line] = put(plus, base, to + next[2 * line]) - to;
                  next[2 * line + 1] = put(minus, base, to + next[2 * line + 1]) - to;
                });
    });
  };
  wide ? fill(static_cast<uint32_t*>(index)) : fill(static_cast<uint16_t*>(index));
}

void planes_to_dense(const Planes& planes, int64_t rows, int64_t cols, double value, void* out,
                     DType dtype, Runtime& rt) {
  with_dtype(dtype, [&](auto tag) {
    using S = decltype(tag);
    using C = typename ComputeOf<S>::type;
    S element[3];
    for (int s = 0; s < 3; ++s) narrow(C((s - 1) * value), element + s);
    element[1] = S{};
    S* to = static_cast<S*>(out);
    rt.split(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t col = 0; col < cols; ++col) {
          const int64_t word = row * planes.words + (col >> 6);
          const int bit = int(col & 63), plus = int(planes.plus[word] >> bit & 1);
          const int minus = int(planes.minus[word] >> bit & 1);
          to[row * cols + col] = element[1 + plus - minus];
        }
    });
  });
}

void lists_to_dense(const AnyLists& lists, int64_t rows, int64_t cols, double value, void* out,
                    DType dtype, Runtime& rt) {
  with_dtype(dtype, [&](auto tag) {
    using S = decltype(tag);
    using C = typename ComputeOf<S>::type;
    S plus, minus;
    narrow(C(value), &plus);
    narrow(C(-value), &minus);
    S* to = static_cast<S*>(out);
    lists.typed([&](const auto& l) {
      rt.split(rows, 1, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<void*>(to + begin * cols), 0,
                    size_t((end - begin) * cols) * sizeof(S));
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t p = l.plus(row); p < l.minus(row); ++p) to[row * cols + l.index[p]] = plus;
          for (int64_t p = l.minus(row); p < l.end(row); ++p) to[row * cols + l.index[p]] = minus;
        }
      });
    });
  });
}

}  // namespace randlora
