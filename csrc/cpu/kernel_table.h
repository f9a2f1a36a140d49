// The table of one instruction set's kernels; dispatch.cpp chooses among these tables.
#pragma once
#include "add_rounded.h"
#include "delta_weight.h"
#include "fill_planes.h"
#include "linear.h"
#include "linear_backward.h"
#include "scaled_basis.h"

#define RANDLORA_STRING_(x) #x
#define RANDLORA_STRING(x) RANDLORA_STRING_(x)

namespace randlora {
namespace RANDLORA_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {RANDLORA_STRING(RANDLORA_ISA), fill_planes, scaled_basis,
                                    scaled_basis_backward,         add_rounded, delta_weight,
                                    delta_weight_backward,         linear,      linear_backward};
  return table;
}

}  // namespace RANDLORA_ISA
}  // namespace randlora
