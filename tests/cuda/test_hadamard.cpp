// The kernels of Hadamard bases on the card, against loops in double.
#include "cuda/device/launch.h"
#include "hadamard.h"
#include "test_device.h"

using namespace randlora;

namespace {

using Case = HadamardCase;

// Rows of N numbers, 2048 and more, by several warps, in 16-byte accesses; slots of several tokens
// and of none: all barriers of up and down separate warps here. Rows of 8192 have two middle
// passes.
void several_warps(DType dtype) {
  TestDevice device;
  for (const Case& c : {Case{40, 2040, 8, 4}, {40, 4200, 8, 3}, {64, 2048, 8, 3}}) {
    const HadamardProblem p(c);
    set_case_of(device, p, dtype);
    check_up(device, p, dtype, false);
    for (const int64_t slots : {2, 5}) check_down(device, p, dtype, slots);
  }
}

// hadamard_fits says for which N up and down have room in shared memory.
void largest() {
  TestDevice device(128, kLeastShared);
  for (const auto& [dtype, d] : {std::pair{DType::bf16, 4096}, {DType::f64, 2048}})
    for (const int64_t more : {0, 1}) {
      const HadamardProblem p({64, d + more, 8, 1});
      set_case_of(device, p, dtype);
      const bool fits = cuda::hadamard_fits(p.sizes, dtype, device);
      EXPECT(fits == !more, "fits %d,", fits);
      try {
        check_down(device, p, dtype, 1);
        EXPECT(fits, "down finds room,");
      } catch (const cuda_on_cpu::Error&) {
        EXPECT(!fits, "down finds no room,");
      }
    }
}

void few() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) several_warps(dtype);
}

void tests() {
  const Case cases[] = {{1, 1, 1},           {4, 1, 3, 1},
                        {3, 10, 11},         {8, 3, 20, 5},  // r > d
                        {7, 61, 61, 9},      {7, 61, 100, 2, 1},
                        {12, 48, 64, 33},    {20, 64, 700, 2},  // rows that repeat
                        {32, 64, 24, 4, 1},                     // D below K
                        {45, 100, 72, 3},                       // several blocks of ranks
                        {16, 512, 24, 5},                       // a whole one
                        {16, 256, 264, 2, 3}};
  TestDevice plain, one(32, 227 << 10, 1);
  size_t turn = 0;
  for (const Case& c : cases) {
    ++turn;
    check_products(plain, c, turn % 2, 2), check_weights(plain, c, turn % 2, 2);
    check_products(one, c, 1 - turn % 2, 2), check_weights(one, c, 1 - turn % 2, 2);
  }
  for (const Case& c : {Case{2, 4090, 9, 5}, {32, 512, 512, 3, 1}, {80, 8000, 3, 2}})
    check_products(plain, c);
  TestDevice small(64, 1 << 10);  // columns of dW in parts
  for (const Case& c : {Case{32, 512, 48}, {7, 61, 100, 3, 1}, {4, 90, 150}})
    check_weights(small, c);
  for (const Case& c :
       {Case{7, 61, 100, 1, 1, 3, true}, {16, 64, 24, 1, 0, 2}, {40, 90, 700, 1, 0, 2, true}})
    for (TestDevice* way : {&plain, &one, &small}) check_weights(*way, c);
  check_weights(plain, {30, 1050, 5});
  for (const int64_t T : {0, 1}) check_products(plain, {5, 33, 20, T});
  few();
  largest();
}

}  // namespace

int main() { return run_tests(tests, few); }
