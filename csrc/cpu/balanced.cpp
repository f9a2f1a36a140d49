#include "balanced.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/balanced_spec.h"

namespace randlora {
namespace {

// The support of a line, ascending; `keys` is scratch of r entries.
void choose(const FillBalanced& p, uint32_t line, std::vector<uint64_t>& keys, uint32_t* support) {
  for (uint32_t g = 0; g < p.r; ++g)
    keys[g] = uint64_t{support_key(p.seed, p.role, line, g)} << 32 | g;
  std::nth_element(keys.begin(), keys.begin() + (p.q - 1), keys.end());
  for (int64_t s = 0; s < p.q; ++s) support[s] = static_cast<uint32_t>(keys[s]);
  std::sort(support, support + p.q);
}

void draw_signs(const FillBalanced& p, uint32_t line, uint32_t group, uint32_t* sign) {
  const int64_t words = sign_words_of(p.n);
  for (int64_t w = 0; w < words; w += 4) {
    const Counter4 drawn = sign_words(p.seed, p.role, line, group, static_cast<uint32_t>(w / 4));
    for (int64_t v = w; v < words && v < w + 4; ++v) sign[v] = drawn.v[v - w];
  }
  sign[words - 1] &= Balanced::present(p.n, words - 1);
}

}  // namespace

void fill_balanced(const FillBalanced& p, Runtime& rt) {
  std::vector<uint32_t> support(p.lines * p.q);
  rt.split(p.lines, 64, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(p.r);
    for (int64_t line = begin; line < end; ++line)
      choose(p, static_cast<uint32_t>(p.line_start + line), keys, support.data() + line * p.q);
  });
  std::fill(p.offset, p.offset + p.r + 1, 0);
  for (const uint32_t g : support) ++p.offset[g + 1];
  for (int64_t g = 0; g < p.r; ++g) p.offset[g + 1] += p.offset[g];
  std::vector<int64_t> next(p.offset, p.offset + p.r), entry(support.size());
  for (size_t e = 0; e < support.size(); ++e) entry[e] = next[support[e]]++;
  rt.split(p.lines, 64, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin * p.q; e < end * p.q; ++e) {
      const int64_t line = e / p.q;
      if (p.wide)
        static_cast<uint32_t*>(p.row)[entry[e]] = static_cast<uint32_t>(line);
      else
        static_cast<uint16_t*>(p.row)[entry[e]] = static_cast<uint16_t>(line);
      draw_signs(p, static_cast<uint32_t>(p.line_start + line), support[e],
                 p.sign + entry[e] * sign_words_of(p.n));
    }
  });
}

void balanced_to_planes(const Balanced& b, int64_t rows, int64_t r, int64_t n, uint64_t* plus,
                        uint64_t* minus, Runtime& rt) {
  const int64_t words = words_of(r * n);
  rt.split(rows, 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = size_t((end - begin) * words) * sizeof(uint64_t);
    std::memset(plus + begin * words, 0, bytes);
    std::memset(minus + begin * words, 0, bytes);
    for (int64_t group = 0; group < r; ++group)
      for (int64_t p = b.first(group, begin), last = b.first(group, end); p < last; ++p)
        for (int64_t e = 0; e < n; ++e) {
          const int64_t col = e * r + group;
          uint64_t* plane = b.sign[p * b.words + e / 32] >> (e % 32) & 1 ? minus : plus;
          plane[b.line(p) * words + (col >> 6)] |= uint64_t{1} << (col & 63);
        }
  });
}

}  // namespace randlora
