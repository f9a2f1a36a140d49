// The two ways to form dW and to contract its gradient, one for each packed format of B.
// delta_weight.cu chooses; every function here takes any dtype, orientation and rounding.
#pragma once
#include "../../core/operators.h"
#include "../device/device.h"

namespace randlora {
namespace cuda {

// B as lists: density^2 of a GEMM's work (delta_lists.cu).
void delta_weight_lists(const DeltaWeight& p, Device& device);
void delta_weight_backward_lists(const DeltaWeightBackward& p, Device& device);

// B as bit planes: a tensor-core product with decoded operands (delta_planes.cu).
void delta_weight_planes(const DeltaWeight& p, Device& device);
void delta_weight_backward_planes(const DeltaWeightBackward& p, Device& device);

}  // namespace cuda
}  // namespace randlora
