// linear, forward and backward, against plain sums in double, with B in both forms.
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

struct Case {
  int64_t in, out, r, T;
  double density;
  Form form;
  bool wide = false;
  bool accumulate = false;
  int64_t skip = 0;  // elements that take the alignment of every matrix away
  int64_t chunk_tokens = 1 << 20;
};

void check(const Case& c, DType dtype, bool tf32) {
  const Layer L(std::max(c.in, c.out), std::min(c.in, c.out), c.r, c.density);
  TestDevice device;
  device.tf32 = tf32;
  device.chunk_bytes = c.chunk_tokens * L.K * bytes_of(dtype);
  check_linear(device, L, L.basis(c.form, c.wide), dtype, c.T, L.d == c.in, c.accumulate, c.skip,
               tolerance(dtype, tf32));
}

// Scratch does not grow with the number of chunks.
struct Counting : TestDevice {
  void* scratch(size_t bytes) override { return total += bytes, TestDevice::scratch(bytes); }
  size_t total = 0;
};
void bounded_scratch() {
  const Layer L(70, 33, 4, 0.3);
  for (const Form form : {Form::lists, Form::planes})
    for (const bool expand : {false, true}) {
      size_t totals[2];
      for (const int i : {0, 1}) {
        Counting device;
        device.chunk_bytes = 128 * L.K * 2;
        device.multiprocessors = 50;  // b_planes shares sums between blocks, through scratch
        check_linear(device, L, L.basis(form), DType::bf16, i ? 500 : 128, expand, false, 0,
                     tolerance(DType::bf16));
        totals[i] = device.total;
      }
      EXPECT(totals[0] == totals[1], "scratch grows with T: %zu, %zu", totals[0], totals[1]);
    }
}

void tests() {
  const Case cases[] = {
      // in, out, r, T, density, form, wide, accumulate, skip, chunk_tokens
      {1, 1, 1, 1, 1.0, Form::lists},
      {33, 70, 8, 5, 0.05, Form::lists, true},                // expand
      {70, 33, 8, 17, 1.0 / 3, Form::lists, false, true, 1},  // reduce
      {40, 40, 8, 33, 1.0 / 3, Form::lists, false, true},     // square
      {20, 30, 32, 9, 1.0 / 3, Form::lists},                  // r > d
      {30, 20, 5, 0, 1.0 / 3, Form::lists, false, true},      // no tokens
      {130, 65, 7, 1, 0.05, Form::lists},                     // one token
      {65, 130, 7, 130, 1.0, Form::lists, false, false, 3},
      {48, 96, 16, 300, 0.1, Form::lists, false, true, 0, 128},  // chunks, the last of few tokens
      {96, 48, 16, 270, 0.1, Form::lists, true, false, 0, 128},
      {96, 48, 16, 700, 0.1, Form::lists, false, true, 0, 512},  // z of a chunk in parts
      {33, 70, 8, 17, 1.0 / 3, Form::planes, false, true},
      {70, 33, 8, 5, 1.0, Form::planes},
      {96, 48, 16, 130, 1.0 / 3, Form::planes, false, true, 0, 128},
  };
  int number = 0;
  for (const Case& c : cases)
    for (const auto [dtype, tf32] : products(number++, 2)) check(c, dtype, tf32);
  bounded_scratch();
}

}  // namespace

int main() { return run_tests(tests); }
