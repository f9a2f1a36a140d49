// The table of one instruction set's kernels; dispatch.cpp chooses among these tables. isa_*.cpp
// are compiled with the flags of their set: ISA_FLAGS in setup.py, ISAS in CMakeLists.txt.
#pragma once
#include "dense.h"
#include "dispatch.h"
#include "fill_planes.h"
#include "hadamard.h"
#include "independent.h"

namespace randlora::RANDLORA_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = [] {
    Kernels all{};
    all.isa = RANDLORA_TEXT(RANDLORA_ISA);
    all.hadamard_add = hadamard_add;
    all.pack_dense = pack_dense;
#define RANDLORA_SET(name, Operator) all.name = name;
    RANDLORA_OPERATORS(RANDLORA_SET)
#undef RANDLORA_SET
    return all;
  }();
  return table;
}

}  // namespace randlora::RANDLORA_ISA
