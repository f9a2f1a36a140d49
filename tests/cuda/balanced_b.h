// A balanced B in "device" memory of exactly its size, filled by the CPU kernels.
#pragma once
#include "cpu/balanced.h"
#include "test_device.h"
#include "thread_runtime.h"

namespace randlora {

struct BalancedB {
  FillBalanced fill;
  Poisoned offset, row, sign;

  BalancedB(int64_t lines, int64_t r, int64_t q, int64_t n, bool wide, bool filled = true,
            int64_t line_start = 3, uint32_t role = 1)
      : offset((r + 1) * 8),
        row(lines * q * (wide ? 4 : 2)),
        sign(lines * q * sign_words_of(n) * 4) {
    fill = {0x123456789abcdef0u,
            role,
            line_start,
            lines,
            r,
            q,
            n,
            wide,
            static_cast<int64_t*>(offset.get()),
            row.get(),
            static_cast<uint32_t*>(sign.get())};
    ThreadRuntime rt(1);
    if (filled) fill_balanced(fill, rt);
  }
  Balanced view() const {
    return {fill.offset,           fill.row,  fill.sign,
            sign_words_of(fill.n), fill.wide, fill.lines * fill.q};
  }
  // All that the three arrays hold.
  std::vector<unsigned char> raw() const {
    std::vector<unsigned char> all;
    const auto add = [&](const Poisoned& p, int64_t bytes) {
      add_to_digest(p.get(), bytes);
      const auto* at = static_cast<const unsigned char*>(p.get());
      all.insert(all.end(), at, at + bytes);
    };
    const int64_t entries = fill.lines * fill.q;
    add(offset, (fill.r + 1) * 8);
    add(row, entries * (fill.wide ? 4 : 2));
    add(sign, entries * sign_words_of(fill.n) * 4);
    return all;
  }
};

}  // namespace randlora
