// The specification of balanced bases against its known-answer vectors, and what packs them.
// Usage: test_balanced tests/data/basis_v2.txt      Exit status 0: everything agrees.
#include <vector>

#include "../../csrc/core/balanced_spec.h"
#include "../../csrc/cpu/balanced.h"
#include "sha256.h"
#include "thread_runtime.h"
#include "vectors.h"

namespace {

using namespace randlora;
using vectors::check_equal;
using vectors::Fields;

template <class T>
std::string joined(const std::vector<T>& values, const char* format) {
  std::string text;
  for (const T& value : values) {
    char item[24];
    std::snprintf(item, sizeof item, format, static_cast<unsigned long long>(value));
    text += (text.empty() ? "" : ",") + std::string(item);
  }
  return text;
}

// Lines packed on `threads` threads.
struct Lines {
  FillBalanced fill{};
  std::vector<int64_t> offset;
  std::vector<uint16_t> narrow;
  std::vector<uint32_t> broad, sign;

  Lines(Fields& fields, bool wide, int threads) {
    fill.seed = fields.integer();
    fill.role = fields.word();
    fill.line_start = fields.word();
    fill.lines = fields.word();
    fill.r = fields.word();
    fill.q = fields.word();
    fill.n = fields.word();
    fill.wide = wide;
    pack(threads);
  }
  void pack(int threads) {
    ThreadRuntime rt(threads);
    const int64_t entries = fill.lines * fill.q;
    offset.assign(fill.r + 1, -1), narrow.assign(entries, 9), broad.assign(entries, 9);
    sign.assign(entries * sign_words_of(fill.n), ~0u);
    fill.offset = offset.data(), fill.sign = sign.data();
    fill.row = fill.wide ? static_cast<void*>(broad.data()) : narrow.data();
    fill_balanced(fill, rt);
  }
  Balanced view() const {
    return {offset.data(), fill.row, sign.data(), sign_words_of(fill.n), fill.wide};
  }
  // As bytes, words in little-endian order.
  std::vector<uint8_t> planes(int threads) const {
    ThreadRuntime rt(threads);
    const int64_t count = fill.lines * words_of(fill.r * fill.n);
    std::vector<uint64_t> words(2 * count, ~uint64_t{0});
    balanced_to_planes(view(), fill.lines, fill.r, fill.n, words.data(), words.data() + count, rt);
    std::vector<uint8_t> bytes;
    for (const uint64_t word : words)
      for (int shift = 0; shift < 64; shift += 8) bytes.push_back(uint8_t(word >> shift));
    return bytes;
  }
};

void test_support(const std::string& line, Fields& fields) {
  const uint64_t seed = fields.integer();
  const uint32_t role = fields.word(), at = fields.word(), r = fields.word(), q = fields.word();
  // By the definition: a group is in where fewer than q others come before it.
  std::vector<uint32_t> support;
  for (uint32_t j = 0; j < r; ++j) {
    uint32_t before = 0;
    const uint32_t key = support_key(seed, role, at, j);
    for (uint32_t other = 0; other < r; ++other) {
      const uint32_t its = support_key(seed, role, at, other);
      before += its < key || (its == key && other < j);
    }
    if (before < q) support.push_back(j);
  }
  check_equal(line, joined(support, "%llu"), fields.text());
}

void test_signs(const std::string& line, Fields& fields) {
  const uint64_t seed = fields.integer();
  const uint32_t role = fields.word(), at = fields.word(), j = fields.word();
  const uint64_t first = fields.integer(), count = fields.integer();
  std::string got;
  for (uint64_t i = first; i < first + count; ++i) {
    const Counter4 words = sign_words(seed, role, at, j, uint32_t(i / kSignsPerBlock));
    got += "+-"[words.v[i % kSignsPerBlock / 32] >> i % 32 & 1];
  }
  check_equal(line, got, fields.text());
}

void test_packed(const std::string& line, Fields& fields) {
  Lines packed(fields, false, 1);
  const std::string offset = fields.text(), row = fields.text(), sign = fields.text();
  for (const bool wide : {false, true}) {
    packed.fill.wide = wide;
    packed.pack(3);
    check_equal(line + " (offset)", joined(packed.offset, "%llu"), offset);
    check_equal(line + " (row)",
                wide ? joined(packed.broad, "%llu") : joined(packed.narrow, "%llu"), row);
    check_equal(line + " (sign)", joined(packed.sign, "%08llx"), sign);
  }
}

void test_planes(const std::string& line, Fields& fields) {
  Lines packed(fields, false, 1);
  const std::string digest = fields.text();
  check_equal(line, sha256::digest(packed.planes(1)), digest);
  packed.fill.wide = true;
  packed.pack(3);
  check_equal(line + " (wide, 3 threads)", sha256::digest(packed.planes(3)), digest);
}

}  // namespace

int main(int argc, char** argv) {
  return vectors::run(argc, argv,
                      {{"support", test_support},
                       {"signs", test_signs},
                       {"packed", test_packed},
                       {"planes", test_planes}});
}
