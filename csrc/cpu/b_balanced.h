// The B side of the factored path for a balanced B: its columns fall into r groups by c % r, and all
// columns of a group g have the same rows S_g, on which every element is +1 or -1.
//
//   up     dst[o] += sum_c B[o, c] src[c]                o in S_g, c of group g
//   down   dst[c] = sum_{o in S_g} B[o, c] src[o]        all n columns c of group g
//
// Both are dense products with signs, so the 16 signed sums of four source rows are tabled and every
// line then adds one entry for four sources. One word of signs numbers the entries of eight tables;
// `up` finds its words as B is packed, `down` transposes 32 lines at a time. Nothing is read outside
// of S_g, and no sum is a product with 0: NaN and inf spread only where B is not zero.
#pragma once
#include "b_side.h"

namespace randlora {
namespace RANDLORA_ISA {

constexpr int kSignedSums = 16;  // entries of a table: 2^4
constexpr int kSignTables = 8;   // of a word: 16 kB in float32, half an L1 cache
constexpr int kSignRows = 32;    // sources of a word

template <class C>
struct SignScratch {
  C* table;          // (kSignTables, kSignedSums, TB)
  uint32_t* column;  // (words, 32): of each column of a group the signs of 32 lines
};

// fn(integral_constant<tables>), even and enough for `rows` <= 32 sources.
template <class F>
RANDLORA_INLINE void with_tables(int64_t rows, const F& fn) {
  if (rows > 24) return fn(std::integral_constant<int, 8>{});
  if (rows > 16) return fn(std::integral_constant<int, 6>{});
  if (rows > 8) return fn(std::integral_constant<int, 4>{});
  fn(std::integral_constant<int, 2>{});
}

// Entry e of table t is the sum of rows 4 t .. 4 t + 3, negative where e has a bit; absent rows are
// zero.
template <class B, int Tables, class Row>
void table_signed_sums(int64_t rows, const Row& row, typename B::C* table) {
  using V = typename B::V;
  for (int t = 0; t < Tables; ++t, table += kSignedSums * B::TB)
    for (int v = 0; v < B::NV; ++v) {
      V s[4];
      unrolled<4>([&](auto m) RANDLORA_INLINED {
        s[m] = 4 * t + m < rows ? load<V>(row(4 * t + m) + v * B::L) : V{};
      });
      const V even = s[0] + s[1], odd = s[0] - s[1], low[4] = {even, -odd, odd, -even};
      const V even2 = s[2] + s[3], odd2 = s[2] - s[3], high[4] = {even2, -odd2, odd2, -even2};
      unrolled<kSignedSums>([&](auto e) RANDLORA_INLINED {
        store(table + e * B::TB + v * B::L, low[e & 3] + high[e >> 2]);
      });
    }
}

// dst(line) (+)= the entries that sign[line * step] numbers, for lines [0, lines).
template <class B, int Tables, class Dst>
void add_signed_sums(const typename B::C* table, const uint32_t* sign, int64_t step, int64_t lines,
                     const Dst& dst, bool fresh) {
  using V = typename B::V;
  for (int64_t line = 0; line < lines; ++line) {
    const uint64_t word = sign[line * step];
    typename B::C* to = dst(line);
    const auto at = [&](auto t, int v) RANDLORA_INLINED {
      return load<V>(table + (t * kSignedSums + (word >> 4 * t & 15)) * B::TB + v * B::L);
    };
    for (int v = 0; v < B::NV; ++v) {
      V sum[Tables / 2];
      unrolled<Tables / 2>([&](auto p) RANDLORA_INLINED {
        sum[p] = at(std::integral_constant<int, 2 * p>{}, v) +
                 at(std::integral_constant<int, 2 * p + 1>{}, v);
      });
      V all = sum[0];
      unrolled<Tables / 2 - 1>([&](auto p) RANDLORA_INLINED { all += sum[p + 1]; });
      store(to + v * B::L, fresh ? all : load<V>(to + v * B::L) + all);
    }
  }
}

// column[i] = bit i of `rows` <= 32 words, that of row p in bit p; the words are `step` apart.
RANDLORA_INLINE void transpose_signs(const uint32_t* sign, int64_t step, int64_t rows,
                                     uint32_t* column) {
  uint32_t m[kSignRows];
  for (int64_t p = 0; p < kSignRows; ++p) m[p] = p < rows ? sign[p * step] : 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_loadu_si512(m), high = _mm512_loadu_si512(m + 16);
  for (int i = 0; i < 32; ++i) {
    const __m512i bit = _mm512_set1_epi32(int(uint32_t{1} << i));
    column[i] = uint32_t{_mm512_test_epi32_mask(low, bit)} |
                uint32_t{_mm512_test_epi32_mask(high, bit)} << 16;
  }
#else
  // Five rounds swap the off-diagonal quarters of ever smaller squares, as transpose_64x64.
  uint32_t mask = 0x0000ffffu;
  for (int s = 16; s != 0; s >>= 1, mask ^= mask << s)
    for (int first = 0; first < kSignRows; first += 2 * s)
      for (int p = first; p < first + s; ++p) {
        const uint32_t t = ((m[p] >> s) ^ m[p + s]) & mask;
        m[p] ^= t << s;
        m[p + s] ^= t;
      }
  __builtin_memcpy(column, m, sizeof(m));
#endif
}

// dst[o] = sum_c B[o, c] src[c] for all rows of B (V -> y).
template <class B>
void balanced_up(const Basis& b, const typename B::C* src, typename B::C* dst,
                 const SignScratch<typename B::C>& scratch) {
  const Balanced& s = b.b_balanced;
  __builtin_memset(dst, 0, size_t(b.D * B::TB) * sizeof(typename B::C));
  for (int64_t group = 0; group < b.r; ++group) {
    const int64_t first = s.offset[group], lines = s.offset[group + 1] - first;
    for (int64_t word = 0; word < s.words; ++word) {
      const int64_t e = kSignRows * word, rows = b.n - e < kSignRows ? b.n - e : kSignRows;
      const auto* of_word = src + (e * b.r + group) * B::TB;
      with_tables(rows, [&](auto tables) RANDLORA_INLINED {
        table_signed_sums<B, tables>(
            rows, [&](int64_t m) RANDLORA_INLINED { return of_word + m * b.r * B::TB; },
            scratch.table);
        add_signed_sums<B, tables>(
            scratch.table, s.sign + first * s.words + word, s.words, lines,
            [&](int64_t p) RANDLORA_INLINED { return dst + s.line(first + p) * B::TB; }, false);
      });
    }
  }
}

// dst[c] = sum_o B[o, c] src[o] for all columns of B (x or dy -> U).
template <class B>
void balanced_down(const Basis& b, const typename B::C* src, typename B::C* dst,
                   const SignScratch<typename B::C>& scratch) {
  const Balanced& s = b.b_balanced;
  for (int64_t group = 0; group < b.r; ++group) {
    const int64_t begin = s.offset[group], end = s.offset[group + 1];
    // At least once, so that the columns of a group without rows become zero.
    for (int64_t first = begin; first == begin || first < end; first += kSignRows) {
      const int64_t rows = end - first < kSignRows ? end - first : kSignRows;
      for (int64_t word = 0; word < s.words; ++word)
        transpose_signs(s.sign + first * s.words + word, s.words, rows, scratch.column + 32 * word);
      with_tables(rows, [&](auto tables) RANDLORA_INLINED {
        table_signed_sums<B, tables>(
            rows, [&](int64_t m) RANDLORA_INLINED { return src + s.line(first + m) * B::TB; },
            scratch.table);
        add_signed_sums<B, tables>(
            scratch.table, scratch.column, 1, b.n,
            [&](int64_t e) RANDLORA_INLINED { return dst + (e * b.r + group) * B::TB; },
            first == begin);
      });
    }
  }
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
