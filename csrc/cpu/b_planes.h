// The B side of independent bases from bit planes, four elements of B at a time.
//
// Four ternary elements of a line have 81 values. So we table the 81 signed sums of four source
// rows once, and every line then adds one table entry per four sources. That takes 1/4 of an add
// per element of B (adding rows one by one takes `density`) and no loop over bits. The elements are
// the base 3 digits of an entry's number: 0, 1 for +1, 2 for -1.
//
// Entries add or subtract rows but never multiply them by 0, so NaN and inf spread only to lines
// in which B is not zero.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora::RANDLORA_ISA {

constexpr int kEntries = 81;  // per table: 3^4
constexpr int kQuads = 8;     // tables in use at a time: 41 kB, about an L1 cache

// Tables are of `kPart` vectors of a block's tokens, at most 64 bytes: with more, fewer tables
// would fit, and dst would be read and written more often.
template <class Block>
constexpr int kPart = Block::kTokens * int(sizeof(typename Block::C)) <= 64 ? Block::kVectors : 1;

template <class Block>
RANDLORA_INLINE int64_t table_length(const TernaryBases& b) {
  return b.has_planes() ? kQuads * kEntries * kPart<Block> * Block::kLanes : 0;
}

// Every line's entry numbers, for one direction: up, lines are rows of B (D) and sources its
// columns (K); down, the other way round. They take a byte for four elements.
struct QuadNumbers {
  bool down;
  int64_t sources = 0, lines = 0;
  uint64_t* words = nullptr;  // (ceil(sources / 64), 2, lines): of eight quads each

  QuadNumbers(const TernaryBases& b, bool down, bool used, Arena& arena) : down(down) {
    if (!used || !b.has_planes()) return;
    sources = down ? b.D : b.K();
    lines = down ? b.K() : b.D;
    words = arena.array<uint64_t>(2 * words_of(sources) * lines);
  }
};

// The numbers of a line's 64 elements: byte q of the result is that of the quad at 8 q + 4 half.
RANDLORA_INLINE uint64_t number_quads(uint64_t plus, uint64_t minus, int half) {
  constexpr uint64_t mask = 0x0101010101010101u;
  const auto digit = [&](int e) RANDLORA_INLINED {
    return (plus >> (4 * half + e) & mask) + 2 * (minus >> (4 * half + e) & mask);
  };
  return digit(0) + 3 * digit(1) + 9 * digit(2) + 27 * digit(3);
}

// Fills `to`, if it is used, a square of 64 x 64 elements at a time.
inline void number_lines(const TernaryBases& b, const QuadNumbers& to, int threads, Runtime& rt) {
  const Planes& planes = b.b_planes;
  rt.split(threads, to.words ? b.D : 0, 64, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += 64)
      for (int64_t column = 0; column < planes.words; ++column) {
        uint64_t plus[64] = {}, minus[64] = {};
        for (int64_t row = 0; row < 64 && first + row < end; ++row) {
          const int64_t at = (first + row) * planes.words + column;
          plus[row] = planes.plus[at];
          minus[row] = planes.minus[at] & ~plus[row];  // in range for any bits
        }
        if (to.down) {
          transpose_64x64(plus);
          transpose_64x64(minus);
        }
        const int64_t line = to.down ? 64 * column : first, word = to.down ? first / 64 : column;
        const int64_t count = to.lines - line < 64 ? to.lines - line : 64;
        for (int half = 0; half < 2; ++half) {
          uint64_t* numbers = to.words + (2 * word + half) * to.lines + line;
          for (int64_t l = 0; l < count; ++l) numbers[l] = number_quads(plus[l], minus[l], half);
        }
      }
  });
}

// Fills kQuads tables: number q is of the source rows 8 q .. 8 q + 3, of which those from `rows` on
// count as zero. An entry adds one of nine sums of the first two rows to one of the other two.
template <class Block>
void fill_tables(const typename Block::C* src, int64_t rows, typename Block::C* table) {
  using Vector = typename Block::Vector;
  constexpr int width = kPart<Block> * Block::kLanes;
  for (int q = 0; q < kQuads; ++q, table += kEntries * width)
    for (int v = 0; v < width; v += Block::kLanes) {
      Vector sums[2][9];
      unrolled<2>([&](auto pair) RANDLORA_INLINED {
        Vector row[2];
        unrolled<2>([&](auto e) RANDLORA_INLINED {
          const int64_t at = 8 * q + 2 * pair + e;
          row[e] = at < rows ? load<Vector>(src + at * Block::kTokens + v) : Vector{};
        });
        const Vector one[3] = {Vector{}, row[0], -row[0]}, other[3] = {Vector{}, row[1], -row[1]};
        unrolled<9>([&](auto e) RANDLORA_INLINED { sums[pair][e] = one[e % 3] + other[e / 3]; });
      });
      unrolled<9>([&](auto high) RANDLORA_INLINED {
        unrolled<9>([&](auto low) RANDLORA_INLINED {
          store(table + (9 * high + low) * width + v, sums[0][low] + sums[1][high]);
        });
      });
    }
}

// dst[line] (+)= the table entries of its quads, whose numbers are the bytes of numbers[line].
template <class Block>
void add_entries(const typename Block::C* table, const uint64_t* numbers, int64_t lines,
                 typename Block::C* dst, bool fresh) {
  using Vector = typename Block::Vector;
  constexpr int width = kPart<Block> * Block::kLanes;
  for (int64_t line = 0; line < lines; ++line, dst += Block::kTokens) {
    const typename Block::C* entry[kQuads];
    unrolled<kQuads>([&](auto q) RANDLORA_INLINED {
      entry[q] = table + (q * kEntries + (numbers[line] >> 8 * q & 255)) * width;
    });
    for (int v = 0; v < width; v += Block::kLanes) {
      const auto at = [&](int q) RANDLORA_INLINED { return load<Vector>(entry[q] + v); };
      const Vector sum = ((at(0) + at(1)) + (at(2) + at(3))) + ((at(4) + at(5)) + (at(6) + at(7)));
      store(dst + v, fresh ? sum : load<Vector>(dst + v) + sum);
    }
  }
}

// dst[line] = the sum of B's elements times src, for one token block: up V -> y, down x or dy -> U.
template <class Block>
void sum_planes(const QuadNumbers& numbers, const typename Block::C* src, typename Block::C* dst,
                typename Block::C* table) {
  constexpr int width = kPart<Block> * Block::kLanes;
  const uint64_t* words = numbers.words;
  for (int64_t word = 0; 64 * word < numbers.sources; ++word)
    for (int half = 0; half < 2; ++half, words += numbers.lines) {
      const int64_t first = 64 * word + 4 * half;
      for (int v = 0; v < Block::kTokens && first < numbers.sources; v += width) {
        fill_tables<Block>(src + first * Block::kTokens + v, numbers.sources - first, table);
        add_entries<Block>(table, words, numbers.lines, dst + v, first == 0);
      }
    }
}

}  // namespace randlora::RANDLORA_ISA
