// Reads and checks files of known-answer vectors: one record per line, a keyword and then fields.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

namespace vectors {

inline int failures = 0;

inline void check(bool good, const std::string& what, const std::string& got,
                  const std::string& wanted) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s\n  got    %s\n  wanted %s\n", what.c_str(), got.c_str(), wanted.c_str());
}

inline void check_equal(const std::string& what, const std::string& got,
                        const std::string& wanted) {
  check(got == wanted, what, got, wanted);
}

// Reads the fields of a record in order; a missing or malformed field is a test failure.
class Fields {
 public:
  explicit Fields(const std::string& line) : line_(line), stream_(line) {}
  std::string text() {
    std::string field;
    if (!(stream_ >> field)) check(false, line_, "too few fields", "one more");
    return field;
  }
  uint64_t integer(int base = 10) {
    const std::string field = text();
    char* end = nullptr;
    const uint64_t value = std::strtoull(field.c_str(), &end, base);
    check(!field.empty() && *end == '\0', line_, field, "an integer");
    return value;
  }
  uint32_t word(int base = 10) {
    const uint64_t value = integer(base);
    check(value <= 0xffffffffu, line_, std::to_string(value), "at most 32 bits");
    return static_cast<uint32_t>(value);
  }
  double real() {
    const std::string field = text();
    char* end = nullptr;
    const double value = std::strtod(field.c_str(), &end);
    check(!field.empty() && *end == '\0', line_, field, "a number");
    return value;
  }
  void finish() {
    std::string field;
    check(!(stream_ >> field), line_, field, "no more fields");
  }

 private:
  std::string line_;
  std::istringstream stream_;
};

// The main function: passes every record of the file argv[1] to the test of its keyword. Every test
// must get at least one record. Returns the exit status.
inline int run(int argc, char** argv,
               const std::map<std::string, void (*)(const std::string&, Fields&)>& tests) {
  if (argc != 2) {
    std::printf("usage: %s path/to/vectors.txt\n", argv[0]);
    return 2;
  }
  std::ifstream file(argv[1]);
  if (!file) {
    std::printf("cannot open %s\n", argv[1]);
    return 2;
  }
  std::map<std::string, int> seen;
  for (std::string line; std::getline(file, line);) {
    Fields fields(line);
    std::string keyword;
    std::istringstream(line) >> keyword;
    if (keyword.empty() || keyword[0] == '#') continue;
    const auto test = tests.find(keyword);
    if (test == tests.end()) {
      check(false, line, keyword, "a known keyword");
      continue;
    }
    fields.text();  // the keyword itself
    test->second(line, fields);
    fields.finish();
    ++seen[keyword];
  }
  for (const auto& entry : tests) {
    check(seen[entry.first] > 0, "records read", "no " + entry.first, "at least one");
  }
  for (const auto& entry : seen)
    std::printf("%-9s %d records\n", entry.first.c_str(), entry.second);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace vectors
