// The table of one instruction set's kernels; dispatch.cpp chooses among these tables. isa_*.cpp
// are compiled with the flags of their set: ISA_FLAGS in setup.py, ISAS in CMakeLists.txt.
#pragma once
#include "dense.h"
#include "dispatch.h"
#include "fill_planes.h"
#include "hadamard.h"
#include "linear.h"

namespace randlora::RANDLORA_ISA {

const Kernels& kernels() {
#define RANDLORA_FUNCTION(name, Operator) name,
  static constexpr Kernels table = {RANDLORA_TEXT(RANDLORA_ISA),
                                    RANDLORA_OPERATORS(RANDLORA_FUNCTION) hadamard_signed,
                                    hadamard_add, pack_dense};
#undef RANDLORA_FUNCTION
  return table;
}

}  // namespace randlora::RANDLORA_ISA
