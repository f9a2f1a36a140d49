// The table of one instruction set's kernels; dispatch.cpp chooses among these tables.
#pragma once
#include "delta_weight.h"
#include "dense.h"
#include "dispatch.h"
#include "fill_planes.h"
#include "hadamard.h"
#include "linear.h"
#include "linear_backward.h"

#define RANDLORA_STRING_(x) #x
#define RANDLORA_STRING(x) RANDLORA_STRING_(x)

namespace randlora::RANDLORA_ISA {

const Kernels& kernels() {
#define RANDLORA_FUNCTION(name, Operator) name,
  static constexpr Kernels table = {RANDLORA_STRING(RANDLORA_ISA),
                                    RANDLORA_OPERATORS(RANDLORA_FUNCTION) hadamard_add};
#undef RANDLORA_FUNCTION
  return table;
}

}  // namespace randlora::RANDLORA_ISA
