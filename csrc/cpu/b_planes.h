// The B side of the factored path from bit planes, four elements of B at a time.
//
// Four ternary elements of a line have 81 values. So we table the 81 signed sums of four source
// rows once, and every line then adds one table entry per four sources. That takes 1/4 of an add
// per element of B (adding rows one by one takes `density`) and no loop over bits. The elements are
// the base 3 digits of an entry's number (0, 1 for +1, 2 for -1); `kDigits` converts bits to these.
//
// Entries add or subtract rows but never multiply them by 0, so NaN and inf spread only to lines
// in which B is not zero.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

constexpr int kEntries = 81;  // per table: 3^4
constexpr int kQuads = 4;     // tables in use at a time: 41 kB in float32, about an L1 cache
constexpr int kQuadRows = 4 * kQuads;

// both[b]: bits 0..3 of b as base 3 digits in the low byte, bits 4..7 in the high byte.
// each[b]: bit c of b in byte c, to number eight lines at once.
struct DigitTable {
  uint16_t both[256] = {};
  uint64_t each[256] = {};
  constexpr DigitTable() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, power[] = {1, 3, 9, 27}; bit < 8; ++bit)
        if (byte >> bit & 1) {
          both[byte] = static_cast<uint16_t>(both[byte] + (power[bit % 4] << (bit < 4 ? 0 : 8)));
          each[byte] |= uint64_t{1} << 8 * bit;
        }
  }
};
static constexpr DigitTable kDigits;

// Scratch of one slot.
template <class C>
struct QuadScratch {
  C* table;         // (kQuads, kEntries, TB)
  uint8_t* number;  // entry numbers: 16 bytes per row of B, or 4 per column padded to whole words

  static int64_t numbers(const Basis& b) {
    const int64_t up = 16 * b.D, down = kQuads * 64 * b.b_planes.words;
    return !b.has_planes() ? 0 : up > down ? up : down;
  }
};

// The four tables of the first 16 of `rows` source rows; missing rows are zero.
template <class B>
void fill_tables(const typename B::C* src, int64_t rows, typename B::C* table) {
  using V = typename B::V;
  for (int q = 0; q < kQuads; ++q, table += kEntries * B::TB) {
    for (int v = 0; v < B::NV; ++v) store(table + v * B::L, V{});
    for (int digit = 0, filled = 1; digit < 4; ++digit, filled *= 3) {
      V row[B::NV];
      const int64_t at = 4 * q + digit;
      for (int v = 0; v < B::NV; ++v)
        row[v] = at < rows ? load<V>(src + at * B::TB + v * B::L) : V{};
      for (int entry = 0; entry < filled; ++entry)
        for (int v = 0; v < B::NV; ++v) {
          const V sum = load<V>(table + entry * B::TB + v * B::L);
          store(table + (filled + entry) * B::TB + v * B::L, sum + row[v]);
          store(table + (2 * filled + entry) * B::TB + v * B::L, sum - row[v]);
        }
    }
  }
}

// dst[line] (+)= the table entries number[line * line_step + quad * quad_step] of its four quads.
template <class B>
void add_entries(const typename B::C* table, const uint8_t* number, int64_t line_step,
                 int64_t quad_step, int64_t lines, typename B::C* dst, bool fresh) {
  using V = typename B::V;
  for (int64_t line = 0; line < lines; ++line, number += line_step, dst += B::TB) {
    const typename B::C* entry[kQuads];
    unrolled<kQuads>([&](auto q) RANDLORA_INLINED {
      entry[q] = table + (q * kEntries + number[q * quad_step]) * B::TB;
    });
    for (int v = 0; v < B::NV; ++v) {
      const auto at = [&](int q) RANDLORA_INLINED { return load<V>(entry[q] + v * B::L); };
      const V sum = (at(0) + at(1)) + (at(2) + at(3));
      store(dst + v * B::L, fresh ? sum : load<V>(dst + v * B::L) + sum);
    }
  }
}

// dst[o] = sum_c B[o, c] src[c] for all rows of B (V -> y) and `count` token blocks side by side:
// planes are decoded once for all of them.
template <class B>
void planes_up(const Basis& b, int count, const typename B::C* src, typename B::C* dst,
               const QuadScratch<typename B::C>& scratch) {
  const Planes& planes = b.b_planes;
  for (int64_t word = 0; word < planes.words; ++word) {
    // A word's 64 columns give 16 numbers per row, in order of column: number 4 * part + quad.
    for (int64_t row = 0; row < b.D; ++row) {
      uint64_t plus = planes.plus[row * planes.words + word];
      uint64_t minus = planes.minus[row * planes.words + word] & ~plus;  // in range for any bits
      for (int byte = 0; byte < 8; ++byte, plus >>= 8, minus >>= 8)
        store(scratch.number + 16 * row + 2 * byte,
              static_cast<uint16_t>(kDigits.both[plus & 255] + 2 * kDigits.both[minus & 255]));
    }
    for (int part = 0; part < 4; ++part) {
      const int64_t first = 64 * word + kQuadRows * part;
      if (first >= b.K()) break;
      for (int g = 0; g < count; ++g) {
        fill_tables<B>(src + (g * b.K() + first) * B::TB, b.K() - first, scratch.table);
        add_entries<B>(scratch.table, scratch.number + 4 * part, 16, 1, b.D, dst + g * b.D * B::TB,
                       first == 0);
      }
    }
  }
}

// dst[c] = sum_o B[o, c] src[o] for all columns of B (x or dy -> U), likewise.
template <class B>
void planes_down(const Basis& b, int count, const typename B::C* src, typename B::C* dst,
                 const QuadScratch<typename B::C>& scratch) {
  const Planes& planes = b.b_planes;
  const int64_t padded = 64 * planes.words;
  for (int64_t first = 0; first < b.D; first += kQuadRows) {
    for (int quad = 0; quad < kQuads; ++quad) {
      uint8_t* number = scratch.number + quad * padded;
      for (int64_t word = 0; word < planes.words; ++word) {
        uint64_t plus[4], minus[4];
        for (int row = 0; row < 4; ++row) {
          const int64_t o = first + 4 * quad + row;
          plus[row] = o < b.D ? planes.plus[o * planes.words + word] : 0;
          minus[row] = o < b.D ? planes.minus[o * planes.words + word] & ~plus[row] : 0;
        }
        for (int byte = 0; byte < 8; ++byte) {
          uint64_t numbers = 0;
          for (int row = 4; row-- > 0;) {
            const int shift = 8 * byte;
            numbers = 3 * numbers + kDigits.each[plus[row] >> shift & 255] +
                      2 * kDigits.each[minus[row] >> shift & 255];
          }
          store(number + 64 * word + 8 * byte, numbers);
        }
      }
    }
    for (int g = 0; g < count; ++g) {
      fill_tables<B>(src + (g * b.D + first) * B::TB, b.D - first, scratch.table);
      add_entries<B>(scratch.table, scratch.number, 1, padded, b.K(), dst + g * b.K() * B::TB,
                     first == 0);
    }
  }
}

}  // namespace randlora::RANDLORA_ISA
