// The B side of the factored path, unstructured: each output line is a sum of signed source rows.
//
//   b_up    dst[o] = sum_c B[o, c] src[c]     lines are rows of B      (V -> y)
//   b_down  dst[c] = sum_o B[o, c] src[o]     lines are columns of B   (x or dy -> U)
//
// Both take a range of lines and write (lines, TB). Lists are summed as they lie in memory. Bit
// planes are decoded, 64 lines by kChunk sources at a time, into lists that stay in the L1 cache.
#pragma once
#include "../core/operators.h"
#include "token_block.h"

namespace randlora {
namespace RANDLORA_ISA {

// acc += sum of src rows index[0 .. count); two chains of adds hide their latency.
template <class B, class Index>
RANDLORA_INLINE void add_rows(const Index* index, int64_t count, const typename B::C* src,
                              typename B::V (&acc)[B::NV]) {
  using V = typename B::V;
  V even[B::NV] = {}, odd[B::NV] = {};
  int64_t p = 0;
  for (; p + 2 <= count; p += 2)
    for (int q = 0; q < B::NV; ++q) {
      even[q] += load<V>(src + int64_t(index[p]) * B::TB + q * B::L);
      odd[q] += load<V>(src + int64_t(index[p + 1]) * B::TB + q * B::L);
    }
  for (int q = 0; q < B::NV; ++q) {
    if (p < count) even[q] += load<V>(src + int64_t(index[p]) * B::TB + q * B::L);
    acc[q] += even[q] + odd[q];
  }
}

template <class B, class Index>
RANDLORA_INLINE void sum_line(const Index* plus, int64_t n_plus, const Index* minus,
                              int64_t n_minus, const typename B::C* src,
                              typename B::V (&acc)[B::NV]) {
  typename B::V negative[B::NV] = {};
  add_rows<B>(plus, n_plus, src, acc);
  add_rows<B>(minus, n_minus, src, negative);
  for (int q = 0; q < B::NV; ++q) acc[q] -= negative[q];
}

template <class B, class Index>
void sum_lists(const Lists<Index>& lists, int64_t begin, int64_t end, const typename B::C* src,
               typename B::C* dst) {
  for (int64_t line = begin; line < end; ++line) {
    typename B::V acc[B::NV] = {};
    const int64_t plus = lists.plus(line), minus = lists.minus(line), last = lists.end(line);
    sum_line<B>(lists.index + plus, minus - plus, lists.index + minus, last - minus, src, acc);
    for (int q = 0; q < B::NV; ++q) store(dst + (line - begin) * B::TB + q * B::L, acc[q]);
  }
}

// ---- bit planes ----------------------------------------------------------------------------------

constexpr int kChunk = 512;  // source lines decoded at a time: 8 words

// For each byte the positions of its set bits and their number, so that decoding never branches
// on a bit: it writes eight entries and advances by the number of bits.
struct BitTable {
  uint16_t position[256][8];
  uint8_t count[256];
  constexpr BitTable() : position(), count() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) position[byte][count[byte]++] = static_cast<uint16_t>(bit);
  }
};
static constexpr BitTable kBits;

// Appends base + (positions of the set bits of m) at `out`, writing up to 8 entries past the end.
RANDLORA_INLINE uint16_t* append_bits(uint64_t m, int base, uint16_t* out) {
  using V = Vec<uint16_t, 16>;
  for (int byte = 0; byte < 8; ++byte, m >>= 8, base += 8) {
    store(out, load<V>(kBits.position[m & 255]) + static_cast<uint16_t>(base));
    out += kBits.count[m & 255];
  }
  return out;
}

// 64 lines of a chunk as lists: `plus` and `minus` each (64, kStride).
struct DecodedChunk {
  static constexpr int kStride = kChunk + 8;
  uint16_t plus[64][kStride], minus[64][kStride];
  int n_plus[64], n_minus[64];
};

// Rows [row, row + lines) of the planes, words [word, word + words).
inline void decode_rows(const Planes& b, int64_t row, int lines, int64_t word, int words,
                        DecodedChunk& to) {
  for (int l = 0; l < lines; ++l) {
    uint16_t *plus = to.plus[l], *minus = to.minus[l];
    for (int w = 0; w < words; ++w) {
      plus = append_bits(b.plus[(row + l) * b.words + word + w], 64 * w, plus);
      minus = append_bits(b.minus[(row + l) * b.words + word + w], 64 * w, minus);
    }
    to.n_plus[l] = int(plus - to.plus[l]);
    to.n_minus[l] = int(minus - to.minus[l]);
  }
}

// The 64 columns of word `word` as lines, rows [row, row + count) as sources.
inline void decode_columns(const Planes& b, int64_t word, int64_t row, int64_t count,
                           DecodedChunk& to) {
  uint16_t *plus[64], *minus[64];
  for (int l = 0; l < 64; ++l) plus[l] = to.plus[l], minus[l] = to.minus[l];
  for (int64_t first = 0; first < count; first += 64) {
    uint64_t square[2][64];
    for (int64_t q = 0; q < 64; ++q) {
      const bool inside = first + q < count;
      square[0][q] = inside ? b.plus[(row + first + q) * b.words + word] : 0;
      square[1][q] = inside ? b.minus[(row + first + q) * b.words + word] : 0;
    }
    transpose_64x64(square[0]);
    transpose_64x64(square[1]);
    for (int l = 0; l < 64; ++l) {
      plus[l] = append_bits(square[0][l], int(first), plus[l]);
      minus[l] = append_bits(square[1][l], int(first), minus[l]);
    }
  }
  for (int l = 0; l < 64; ++l) {
    to.n_plus[l] = int(plus[l] - to.plus[l]);
    to.n_minus[l] = int(minus[l] - to.minus[l]);
  }
}

template <class B>
void sum_chunk(const DecodedChunk& chunk, int first, int last, const typename B::C* src,
               typename B::C* dst, bool fresh) {
  using V = typename B::V;
  for (int l = first; l < last; ++l) {
    typename B::C* to = dst + int64_t(l - first) * B::TB;
    V acc[B::NV];
    for (int q = 0; q < B::NV; ++q) acc[q] = fresh ? V{} : load<V>(to + q * B::L);
    sum_line<B>(chunk.plus[l], chunk.n_plus[l], chunk.minus[l], chunk.n_minus[l], src, acc);
    for (int q = 0; q < B::NV; ++q) store(to + q * B::L, acc[q]);
  }
}

// ---- the two products ----------------------------------------------------------------------------

// Token blocks side by side: planes are decoded once for all of them.
template <class C>
struct Blocks {
  int count;
  const C* src;
  int64_t src_step;
  C* dst;
  int64_t dst_step;
};

// Lines [begin, end) of B's rows; `chunk` is scratch, used for planes only.
template <class B>
void b_up(const Basis& b, int64_t begin, int64_t end, const Blocks<typename B::C>& on,
          DecodedChunk* chunk) {
  if (!b.has_planes()) {
    for (int g = 0; g < on.count; ++g) {
      const auto* src = on.src + g * on.src_step;
      auto* dst = on.dst + g * on.dst_step;
      b.wide ? sum_lists<B>(b.b_rows.as<uint32_t>(), begin, end, src, dst)
             : sum_lists<B>(b.b_rows.as<uint16_t>(), begin, end, src, dst);
    }
    return;
  }
  for (int64_t line = begin; line < end; line += 64) {
    const int lines = int(end - line < 64 ? end - line : 64);
    for (int64_t word = 0; word < b.b_planes.words; word += kChunk / 64) {
      const int64_t left = b.b_planes.words - word;
      decode_rows(b.b_planes, line, lines, word, int(left < kChunk / 64 ? left : kChunk / 64),
                  *chunk);
      for (int g = 0; g < on.count; ++g)
        sum_chunk<B>(*chunk, 0, lines, on.src + g * on.src_step + word * 64 * B::TB,
                     on.dst + g * on.dst_step + (line - begin) * B::TB, word == 0);
    }
  }
}

// Lines [begin, end) of B's columns.
template <class B>
void b_down(const Basis& b, int64_t begin, int64_t end, const Blocks<typename B::C>& on,
            DecodedChunk* chunk) {
  if (!b.has_planes()) {
    for (int g = 0; g < on.count; ++g) {
      const auto* src = on.src + g * on.src_step;
      auto* dst = on.dst + g * on.dst_step;
      b.wide ? sum_lists<B>(b.b_cols.as<uint32_t>(), begin, end, src, dst)
             : sum_lists<B>(b.b_cols.as<uint16_t>(), begin, end, src, dst);
    }
    return;
  }
  for (int64_t word = begin / 64; word * 64 < end; ++word) {
    const int first = int(begin > word * 64 ? begin - word * 64 : 0);
    const int last = int(end - word * 64 < 64 ? end - word * 64 : 64);
    for (int64_t row = 0; row < b.D; row += kChunk) {
      const int64_t count = b.D - row < kChunk ? b.D - row : kChunk;
      decode_columns(b.b_planes, word, row, count, *chunk);
      for (int g = 0; g < on.count; ++g)
        sum_chunk<B>(*chunk, first, last, on.src + g * on.src_step + row * B::TB,
                     on.dst + g * on.dst_step + (word * 64 + first - begin) * B::TB, row == 0);
    }
  }
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
