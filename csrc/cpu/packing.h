// Converts a ternary matrix between dense, bit-plane and list forms, once per basis.
#pragma once
#include "../core/operators.h"

namespace randlora {

#define RANDLORA_DECLARE(name, Operator) void name(const Operator& p, Runtime& rt);
RANDLORA_PACKING(RANDLORA_DECLARE)
#undef RANDLORA_DECLARE

}  // namespace randlora
