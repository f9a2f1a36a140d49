// Converts a ternary matrix between dense, bit-plane and list forms, once per basis.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"

#define RANDLORA_ISA packing
#define RANDLORA_VECTOR_BYTES 16
#include "simd.h"

namespace randlora {
namespace {

using packing::narrow;
using packing::widen;

// fn(line, plus word, minus word, base) for every word of every line in [begin, end).
template <class F>
void each_word(const CountLists& lists, int64_t begin, int64_t end, const F& fn) {
  const Planes& p = lists.planes;
  if (!lists.by_column) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t w = 0; w < p.words; ++w)
        fn(row, p.plus[row * p.words + w], p.minus[row * p.words + w], w * 64);
    return;
  }
  for (int64_t word = begin / 64; word * 64 < end; ++word)
    for (int64_t first = 0; first < lists.rows; first += 64) {
      uint64_t plus[64], minus[64];
      for (int64_t q = 0; q < 64; ++q) {
        const bool inside = first + q < lists.rows;
        plus[q] = inside ? p.plus[(first + q) * p.words + word] : 0;
        minus[q] = inside ? p.minus[(first + q) * p.words + word] : 0;
      }
      transpose_64x64(plus);
      transpose_64x64(minus);
      for (int64_t c = word * 64; c < end && c < word * 64 + 64; ++c)
        fn(c, plus[c & 63], minus[c & 63], first);
    }
}

uint16_t* put(uint64_t m, int64_t base, uint16_t* at) {
  for (; m; m &= m - 1) *at++ = static_cast<uint16_t>(base + __builtin_ctzll(m));
  return at;
}

}  // namespace

void pack_dense(const PackDense& p, Runtime& rt) {
  with_dtype(p.dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(p.dense);
    const int64_t count = p.rows * p.cols, words = words_of(p.cols);
    double a = 0;
    for (int64_t e = 0; e < count && a == 0; ++e) a = std::fabs(double(widen(x[e])));
    std::vector<int64_t> first_bad(p.rows, count);
    rt.split(p.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t w = 0; w < words; ++w) {
          uint64_t plus = 0, minus = 0, other = 0;
          const int64_t first = row * p.cols + w * 64;
          const int64_t here = p.cols - w * 64 < 64 ? p.cols - w * 64 : 64;
          for (int64_t b = 0; b < here; ++b) {
            const double v = widen(x[first + b]);
            const bool is_plus = v == a && a != 0, is_minus = v == -a && a != 0;
            plus |= uint64_t{is_plus} << b;
            minus |= uint64_t{is_minus} << b;
            other |= uint64_t{!(is_plus || is_minus || v == 0)} << b;
          }
          p.plus[row * words + w] = plus;
          p.minus[row * words + w] = minus;
          if (other && first_bad[row] == count) first_bad[row] = first + __builtin_ctzll(other);
        }
    });
    int64_t bad = count;  // the first of all: the same for any thread count
    for (const int64_t of_row : first_bad) bad = std::min(bad, of_row);
    p.report->a = a;
    p.report->bad = static_cast<uint64_t>(bad);
  });
}

void count_lists(const CountLists& p, Runtime& rt) {
  const int64_t count = 2 * p.lines();
  std::memset(p.offset, 0, size_t(count + 1) * sizeof(int64_t));
  rt.split(p.lines(), 64, [&](int64_t begin, int64_t end) {
    each_word(p, begin, end, [&](int64_t line, uint64_t plus, uint64_t minus, int64_t) {
      p.offset[2 * line + 1] += __builtin_popcountll(plus);
      p.offset[2 * line + 2] += __builtin_popcountll(minus);
    });
  });
  for (int64_t q = 0; q < count; ++q) p.offset[q + 1] += p.offset[q];
}

void fill_lists(const FillLists& p, Runtime& rt) {
  std::vector<int64_t> next(p.offset, p.offset + 2 * p.lines());
  rt.split(p.lines(), 64, [&](int64_t begin, int64_t end) {
    each_word(p, begin, end, [&](int64_t line, uint64_t plus, uint64_t minus, int64_t base) {
      next[2 * line] = put(plus, base, p.index + next[2 * line]) - p.index;
      next[2 * line + 1] = put(minus, base, p.index + next[2 * line + 1]) - p.index;
    });
  });
}

void planes_to_dense(const PlanesToDense& p, Runtime& rt) {
  with_dtype(p.dtype, [&](auto tag) {
    using S = decltype(tag);
    using C = ComputeOf<S>;
    S plus, minus;
    narrow(C(p.value), &plus);
    narrow(C(-p.value), &minus);
    const uint64_t inside = ~uint64_t{0} >> (p.planes.words * 64 - p.cols);  // of a row's last word
    rt.split(p.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        S* to = static_cast<S*>(p.out) + row * p.cols;
        std::fill(to, to + p.cols, S{});
        const auto set = [&](const uint64_t* words, S value) {
          for (int64_t w = 0; w < p.planes.words; ++w) {
            uint64_t m = words[row * p.planes.words + w];
            if (w + 1 == p.planes.words) m &= inside;
            for (; m; m &= m - 1) to[w * 64 + __builtin_ctzll(m)] = value;
          }
        };
        set(p.planes.plus, plus);
        set(p.planes.minus, minus);
      }
    });
  });
}

}  // namespace randlora
