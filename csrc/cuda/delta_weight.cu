// dW = scale * B A' and its adjoint, by the packed format of B.
#include "delta_weight.h"
#include "kernels.h"

namespace randlora {
namespace cuda {

namespace {

// Of a balanced B the planes are made first, 2 bits an element in scratch memory.
template <class P>
P with_planes(const P& p, Device& device) {
  const Basis& b = p.basis;
  const int64_t words = words_of(b.K());
  auto* plus = scratch<uint64_t>(device, 2 * b.D * words);
  auto* minus = plus + b.D * words;
  balanced_to_planes(b.b_balanced, b.D, b.r, b.n, plus, minus, device);
  P decoded = p;
  decoded.basis.b_planes = {plus, minus, words};
  decoded.basis.b_balanced = {};
  return decoded;
}

}  // namespace

void delta_weight(const DeltaWeight& p, Device& device) {
  if (p.basis.has_balanced())
    delta_weight_planes(with_planes(p, device), device);
  else if (p.basis.has_planes())
    delta_weight_planes(p, device);
  else
    delta_weight_lists(p, device);
}

void delta_weight_backward(const DeltaWeightBackward& p, Device& device) {
  if (p.basis.has_balanced())
    delta_weight_backward_planes(with_planes(p, device), device);
  else if (p.basis.has_planes())
    delta_weight_backward_planes(p, device);
  else
    delta_weight_backward_lists(p, device);
}

}  // namespace cuda
}  // namespace randlora
