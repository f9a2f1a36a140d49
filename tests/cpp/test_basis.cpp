// Tests the header-only basis specification against the known-answer vectors.
// Usage: test_basis tests/data/basis_v1.txt      Exit status 0: everything agrees.

#include <cstdio>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/core/ternary_spec.h"
#include "sha256.h"
#include "vectors.h"

namespace {

using randlora::Counter4;
using vectors::check;
using vectors::check_equal;
using vectors::Fields;

struct Slice {
  uint64_t seed;
  uint32_t role, row, col, rows, cols, threshold;
  int at(uint32_t i, uint32_t j) const {
    return randlora::element(seed, role, row + i, col + j, threshold);
  }
};

Slice read_slice(Fields& fields) {
  Slice slice{};
  slice.seed = fields.integer();
  slice.role = fields.word();
  slice.row = fields.word();
  slice.col = fields.word();
  slice.rows = fields.word();
  slice.cols = fields.word();
  slice.threshold = randlora::threshold(fields.real());
  return slice;
}

void test_philox(const std::string& line, Fields& fields) {
  uint32_t w[10];
  for (uint32_t& word : w) word = fields.word(16);
  const Counter4 got = randlora::philox4x32_10(Counter4{{w[0], w[1], w[2], w[3]}}, w[4], w[5]);
  char text[36], wanted[36];
  std::snprintf(text, sizeof text, "%08x %08x %08x %08x", got.v[0], got.v[1], got.v[2], got.v[3]);
  std::snprintf(wanted, sizeof wanted, "%08x %08x %08x %08x", w[6], w[7], w[8], w[9]);
  check_equal(line, text, wanted);
}

void test_threshold(const std::string& line, Fields& fields) {
  const uint32_t got = randlora::threshold(fields.real());
  check_equal(line, std::to_string(got), std::to_string(fields.word()));
}

void test_elements(const std::string& line, Fields& fields) {
  Slice slice{};
  slice.seed = fields.integer();
  slice.role = fields.word();
  slice.row = fields.word();
  slice.col = fields.word();
  slice.cols = fields.word();
  slice.threshold = randlora::threshold(fields.real());
  std::string got;
  for (uint32_t j = 0; j < slice.cols; ++j) got += "-0+"[slice.at(0, j) + 1];
  check_equal(line, got, fields.text());
}

void test_counts(const std::string& line, Fields& fields) {
  const Slice slice = read_slice(fields);
  uint64_t count[3] = {0, 0, 0};
  for (uint32_t i = 0; i < slice.rows; ++i) {
    for (uint32_t j = 0; j < slice.cols; ++j) ++count[slice.at(i, j) + 1];
  }
  check_equal(line + " (+1)", std::to_string(count[2]), std::to_string(fields.integer()));
  check_equal(line + " (-1)", std::to_string(count[0]), std::to_string(fields.integer()));
}

void test_planes(const std::string& line, Fields& fields) {
  const Slice slice = read_slice(fields);
  const size_t row_bytes = (static_cast<size_t>(slice.cols) + 63) / 64 * 8;
  std::vector<uint8_t> bytes(2 * slice.rows * row_bytes, 0);
  for (uint32_t i = 0; i < slice.rows; ++i) {
    for (uint32_t j = 0; j < slice.cols; ++j) {
      const int value = slice.at(i, j);
      if (value == 0) continue;
      const size_t plane_row = (value > 0 ? 0 : slice.rows) + static_cast<size_t>(i);
      bytes[plane_row * row_bytes + j / 8] |= static_cast<uint8_t>(1u << (j % 8));
    }
  }
  check_equal(line, sha256::digest(bytes), fields.text());
}

void test_lists(const std::string& line, Fields& fields) {
  const Slice slice = read_slice(fields);
  const std::string by = fields.text();
  check(by == "row" || by == "column", line, by, "row or column");
  const bool by_column = by == "column";
  const uint32_t lists = by_column ? slice.cols : slice.rows;
  const uint32_t length = by_column ? slice.rows : slice.cols;
  std::string offset = "0", index;
  size_t found = 0;
  for (uint32_t q = 0; q < lists; ++q) {
    for (const int sign : {1, -1}) {
      for (uint32_t at = 0; at < length; ++at) {
        if ((by_column ? slice.at(at, q) : slice.at(q, at)) != sign) continue;
        index += (found++ == 0 ? "" : ",") + std::to_string(at);
      }
      offset += "," + std::to_string(found);
    }
  }
  check_equal(line + " (offset)", offset, fields.text());
  check_equal(line + " (index)", index, fields.text());
}

// A group of 64 columns uses each of its 16 counters for four columns, one per output word.
void test_layout() {
  for (const uint32_t first : {0u, 64u, 0xffffffc0u}) {
    std::set<std::pair<uint32_t, uint32_t>> used;
    for (uint32_t b = 0; b < randlora::kColumnsPerGroup; ++b) {
      const uint32_t block = randlora::block_of_column(first + b);
      check(block / 16 == first / 64, "group of column", std::to_string(block / 16),
            std::to_string(first / 64));
      used.insert({block, randlora::word_of_column(first + b)});
    }
    check_equal("distinct (block, word) pairs", std::to_string(used.size()), "64");
  }
}

// is_plus and is_minus against plain 64-bit arithmetic, at and around every edge of the value rule.
void test_value_rule() {
  for (const uint32_t t : {1u, 2u, 33554432u, 715827883u, 0x7fffffffu, 0x80000000u}) {
    for (const uint64_t edge : {uint64_t{0}, uint64_t{t}, 2 * uint64_t{t}, uint64_t{1} << 32}) {
      for (int64_t step = -2; step <= 2; ++step) {
        const uint32_t u = static_cast<uint32_t>(edge + static_cast<uint64_t>(step));
        const std::string what = "u " + std::to_string(u) + " t " + std::to_string(t);
        check_equal(what + " plus", std::to_string(randlora::is_plus(u, t)),
                    std::to_string(u < uint64_t{t}));
        check_equal(what + " minus", std::to_string(randlora::is_minus(u, t)),
                    std::to_string(u >= uint64_t{t} && u < 2 * uint64_t{t}));
      }
    }
  }
}

void test_refusals() {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {0.0, -0.0, -1.0, 1.0 + std::numeric_limits<double>::epsilon(), infinity,
                           -infinity, std::numeric_limits<double>::quiet_NaN()}) {
    check_equal("threshold of " + std::to_string(bad), std::to_string(randlora::threshold(bad)),
                "0");
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Checks the digest code itself against a published value first (FIPS 180-4, "abc").
  check_equal("sha256 of abc", sha256::digest({'a', 'b', 'c'}),
              "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  test_layout();
  test_value_rule();
  test_refusals();
  return vectors::run(argc, argv,
                      {{"philox", test_philox},
                       {"threshold", test_threshold},
                       {"elements", test_elements},
                       {"counts", test_counts},
                       {"planes", test_planes},
                       {"lists", test_lists}});
}
