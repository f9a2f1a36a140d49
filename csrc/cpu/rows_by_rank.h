// Visits rows of B one rank index at a time: for row o and rank index j, the bases i for which
// B[o, j * n + i] is +1 and those for which it is -1. Used by delta_weight and its adjoint.
#pragma once
#include "../core/operators.h"
#include "simd.h"

namespace randlora::RANDLORA_ISA {

// The positions and number of set bits of each byte. Decoding then never branches on a bit: it
// writes eight entries and advances by the number of bits.
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

template <int Rows>
class RowsByRank {
 public:
  RowsByRank(const Basis& b, Arena& arena) : b_(b) {
    // append_bits may write 8 entries past the end, and works in steps of a word.
    plus_ = arena.array<uint16_t>(b.has_lists() ? 0 : b.n + 72);
    minus_ = arena.array<uint16_t>(b.has_lists() ? 0 : b.n + 72);
  }

  // Starts on rows [first, first + rows); visits must have ascending j, from `j` on.
  void start(int64_t first, int rows, int64_t j) {
    first_ = first;
    if (b_.has_planes()) return;
    b_.b_rows.typed([&](const auto& lists) {
      for (int q = 0; q < rows; ++q) {
        const int64_t o = first + q, column = j * b_.n;
        cursor_[q][0] = lower_bound(lists.index, lists.plus(o), lists.minus(o), column);
        cursor_[q][1] = lower_bound(lists.index, lists.minus(o), lists.end(o), column);
      }
    });
  }

  // fn(plus, n_plus, minus, n_minus, origin): base i is entry - origin.
  template <class F>
  RANDLORA_HD_MEMBER void visit(int q, int64_t j, const F& fn) {
    if (b_.has_planes()) {
      const int64_t row = (first_ + q) * b_.b_planes.words;
      const uint16_t* plus_end = decode(b_.b_planes.plus + row, j, plus_);
      const uint16_t* minus_end = decode(b_.b_planes.minus + row, j, minus_);
      fn(plus_, plus_end - plus_, minus_, minus_end - minus_, 0);
    } else {
      b_.b_rows.typed([&](const auto& lists) {
        const int64_t o = first_ + q, stop = (j + 1) * b_.n;
        const int64_t p = cursor_[q][0], m = cursor_[q][1];
        int64_t p_end = p, m_end = m;
        while (p_end < lists.minus(o) && lists.index[p_end] < stop) ++p_end;
        while (m_end < lists.end(o) && lists.index[m_end] < stop) ++m_end;
        cursor_[q][0] = p_end;
        cursor_[q][1] = m_end;
        fn(lists.index + p, p_end - p, lists.index + m, m_end - m, j * b_.n);
      });
    }
  }

 private:
  const uint16_t* decode(const uint64_t* row, int64_t j, uint16_t* out) const {
    for (int64_t i = 0; i < b_.n; i += 64) {
      const int64_t count = b_.n - i < 64 ? b_.n - i : 64;
      out = append_bits(Planes::bits(row, j * b_.n + i, count), int(i), out);
    }
    return out;
  }

  const Basis& b_;
  int64_t first_ = 0;
  int64_t cursor_[Rows][2];
  uint16_t *plus_, *minus_;
};

}  // namespace randlora::RANDLORA_ISA
