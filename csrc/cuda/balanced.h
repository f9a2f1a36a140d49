// A balanced matrix on the card (core/balanced.h): its groups as the rank indices of a Support, and
// its signs as values (balanced.cu).
#pragma once
#include "../core/balanced.h"
#include "support.h"

namespace randlora {
namespace cuda {

// Lines are the features: entry = 2 * line.
Support support_of(const Balanced& b, int64_t lines, int64_t r, int64_t n, Device& device);

// values (room, bases): +1 and -1, zero where either pads.
const void* sign_values(const Balanced& b, const Support& s, DType dtype, Device& device);

}  // namespace cuda
}  // namespace randlora
