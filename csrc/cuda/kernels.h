// Every launcher of the CUDA library. They take the structs of csrc/core with device
// pointers and enqueue on device.stream; none waits for the card. Offsets of lists are on the card,
// so the host knows only the number of entries (Lists::count).
#pragma once
#include "../core/device.h"
#include "../core/hadamard.h"
#include "../core/operators.h"

namespace randlora::cuda {

// fill_planes.cu   scaled_basis.cu
// linear.cu        compositions of the products below
// hadamard/*.cu    what surrounds the class products of Hadamard bases (core/hadamard.h)
// packing/*.cu     the CPU's results, bit for bit
#define RANDLORA_DECLARE(name, Operator) void name(const Operator& p, Device& device);
RANDLORA_OPERATORS(RANDLORA_DECLARE)
#undef RANDLORA_DECLARE

// hadamard_down.cu: whether rows of N numbers fit shared memory, which hadamard_up and
// hadamard_down need.
bool hadamard_fits(const HadamardSizes& sizes, DType dtype, const Device& device);

// hadamard_diagonals.cu: for each expert, whose sums and dlam lie one behind the other.
void add_slots(const HadamardSlotSums& p, int64_t experts, Device& device);

// device/context.cpp: facts about a card, which card is current, and whether it can run the kernels
void describe(int index, Device& device);
void make_current(int index);
const char* refusal(int index);

// fill_planes.cu: a kernel, to ask about. All are compiled for the same cards.
const void* some_kernel();

// a_support.cu: fills TernaryBases::a_tables, support_numbers(a.count, r, d) numbers.
void support_tables(const Lists& a, int64_t r, int64_t d, int32_t* tables, Device& device);

// On independent bases, the products with B; those with A' are ASideCall's (a_side.h). All matrices
// are row-major in `dtype`.
//   up    to (T, D) = from (T, K) B^T [+ to]
//   down  to (T, K) = from (T, D) B
struct BSide {
  const TernaryBases& basis;
  DType dtype = DType::f32;
  int64_t T = 0;
  bool up = false;
  const void* from = nullptr;
  void* to = nullptr;
  bool accumulate = false;
};
void b_lists(const BSide& p, Device& device);
void b_planes(const BSide& p, Device& device);

}  // namespace randlora::cuda
