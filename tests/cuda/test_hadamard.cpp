// The kernels of Hadamard bases on the card, against loops in double.
#include "hadamard.h"
#include "test_device.h"

using namespace randlora;

namespace {

using Case = HadamardCase;

// How a test starts the kernels: blocks, shared memory, and chunks of scratch memory.
struct Way : TestDevice {
  explicit Way(int threads = 128, int64_t shared = 227 << 10, int64_t chunk = 64 << 20,
               int multiprocessors_ = 3) {
    max_threads = threads, shared_bytes = shared, chunk_bytes = chunk;
    multiprocessors = multiprocessors_;
  }
};

void tests() {
  const Case cases[] = {{1, 1, 1},
                        {4, 1, 3, 1},
                        {3, 10, 11},
                        {8, 3, 20, 5},  // r > d
                        {7, 61, 61, 9},
                        {7, 61, 100, 2, 1},
                        {12, 48, 64, 33},
                        {20, 64, 700, 2},    // rows that repeat
                        {32, 64, 24, 4, 1},  // D below K
                        {45, 100, 72, 3},    // several blocks of ranks
                        {16, 256, 264, 2, 3},
                        {7, 61, 100, 3, 0, 13, 20, 25, 30},  // parts
                        {7, 61, 100, 3, 1, 9, 9, 88, 12},
                        {32, 64, 64, 3, 0, 62, 2, 16, 32},
                        {45, 100, 640, 2, 0, 51, 30, 200, 440}};
  Way plain, one(32, 227 << 10, 64 << 20, 1);
  // All passes, in shared memory and in scratch memory, there in chunks of two tokens.
  Way small(64, 1 << 10, 2 * 4096 * 8);
  size_t turn = 0;
  for (const Case& c : cases) {
    ++turn;
    check_products(plain, c, turn % 2, 2), check_weights(plain, c, turn % 2, 2);
    check_products(one, c, 1 - turn % 2, 2), check_weights(one, c, 1 - turn % 2, 2);
  }
  for (const Case& c : {Case{2, 4090, 9, 5}, {32, 512, 512, 3, 1}, {45, 100, 72, 3}})
    check_products(plain, c), check_products(small, c);
  check_products(plain, {1, 8000, 3, 2, 0, 17, 40});
  for (const Case& c : {Case{32, 512, 48}, {7, 61, 100, 3, 1, 9, 9, 88, 12}, {4, 90, 150}})
    check_weights(small, c);
  check_weights(plain, {16, 3000, 5, 0, 0, 170, 40});
  for (const int64_t T : {0, 1}) check_products(plain, {5, 33, 20, T});
  check_products(small, {5, 33, 20, 0});
  for (const DType dtype : kTypes)
    for (const bool transposed : {false, true}) {
      for (const Case& c : {Case{8, 64, 96}, {8, 64, 96, 1, 1}, {7, 35, 70}})
        if (bytes_of(dtype) == 2) check_stochastic(plain, HadamardProblem(c), dtype, transposed);
    }
}

}  // namespace

int main() { return run_tests(tests); }
