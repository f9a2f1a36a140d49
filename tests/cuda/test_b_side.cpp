// The products with B, as lists (b_lists.cu) and as planes (b_planes.cu), against plain sums in
// double.
#include "layer.h"
#include "test_device.h"

using namespace randlora;

namespace {

struct Case {
  Form form;
  int64_t D, d, r, T;
  double density;
  int64_t skip = 0;            // elements that take the alignment of every matrix away
  int multiprocessors = 3;     // many of them: blocks share the contraction of a tile
  int64_t shared = 227 << 10;  // of a block
};

void b_side(Form form, const cuda::BSide& p, TestDevice& device) {
  (form == Form::lists ? cuda::b_lists : cuda::b_planes)(p, device);
}

void check(const Case& c, DType dtype) {
  const Layer L(c.D, c.d, c.r, c.density);
  const TernaryBases basis = L.basis(c.form);
  const int64_t T = c.T, D = c.D, K = L.K;
  TestDevice device(128, c.shared, c.multiprocessors);
  set_case_of(device, L, basis, dtype, T, false, c.skip);
  const double bound = tolerance(dtype);
  const Array V(dtype, normal(T * K, 3), c.skip), x(dtype, normal(T * D, 4), c.skip),
      start(dtype, normal(T * D, 5), c.skip), y(dtype, T * D, c.skip), U(dtype, T * K, c.skip);
  const Values want = product(V.values(), L.B.dense, T, D, K, true), old = start.values();
  b_side(c.form, {basis, dtype, T, true, V.get(), y.get(), false}, device);
  compare("y", y, want, bound);
  b_side(c.form, {basis, dtype, T, true, V.get(), start.get(), true}, device);
  compare("y + y", start, sum(old, want), bound);
  b_side(c.form, {basis, dtype, T, false, x.get(), U.get(), false}, device);
  compare("U", U, product(x.values(), L.B.dense, T, K, D, false), bound);
}

void few() {
  for (const int64_t T : {1, 5, 37}) check({Form::lists, 130, 70, 8, T, 0.2}, DType::bf16);
}

void tests() {
  const Form lists = Form::lists, planes = Form::planes;
  const double third = 1.0 / 3;
  const Case cases[] = {// form, D, d, r, T, density, skip, multiprocessors, shared
                        {lists, 1, 1, 1, 1, 1.0},            // everything is one
                        {lists, 70, 33, 8, 1, third},        // one token
                        {lists, 40, 40, 8, 0, third},        // no tokens
                        {lists, 33, 20, 32, 5, 0.05},        // r > d; empty lines
                        {lists, 64, 64, 64, 17, third},      // n = 1
                        {lists, 40, 30, 4, 9, 0.0},          // B is zero
                        {lists, 300, 130, 7, 33, 1.0},       // longer than what is fetched ahead
                        {lists, 300, 130, 7, 8, third, 1},   // unaligned
                        {lists, 130, 130, 1, 130, 0.05, 3},  // many tiles
                        {lists, 530, 100, 8, 40, 0.05, 0, 20, 99 << 10},  // ranges of lines
                        {lists, 300, 100, 8, 40, 0.1, 0, 3, 6 << 10},     // no room for 16 tokens,
                        {lists, 300, 100, 8, 40, 0.1, 0, 40, 3 << 10},    // nor for 8: panels
                        {planes, 1, 1, 1, 1, 1.0},
                        {planes, 64, 64, 8, 17, third, 0, 1},
                        {planes, 33, 20, 7, 5, 0.05, 1},
                        {planes, 130, 65, 16, 33, third, 0, 60},
                        {planes, 48, 16, 32, 130, 1.0, 0, 1},
                        {planes, 300, 96, 4, 16, third, 0, 100},
                        {planes, 200, 136, 136, 70, 0.05, 1, 1},
                        {planes, 260, 130, 2, 130, third, 0, 1},
                        {planes, 40, 40, 8, 0, 1.0}};
  for (const Case& c : cases)
    for (const DType dtype : kTypes) check(c, dtype);
}

}  // namespace

int main() { return run_tests(tests, few); }
