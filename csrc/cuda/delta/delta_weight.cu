// dW = scale * B A' and its adjoint, by the packed format of B.
#include "../kernels.h"
#include "delta_weight.h"

namespace randlora {
namespace cuda {

void delta_weight(const DeltaWeight& p, Device& device) {
  if (p.basis.has_planes())
    delta_weight_planes(p, device);
  else
    delta_weight_lists(p, device);
}

void delta_weight_backward(const DeltaWeightBackward& p, Device& device) {
  if (p.basis.has_planes())
    delta_weight_backward_planes(p, device);
  else
    delta_weight_backward_lists(p, device);
}

}  // namespace cuda
}  // namespace randlora
