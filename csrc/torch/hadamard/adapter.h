// What the operators on Hadamard bases get of an adapter, and the checks of it.
#pragma once
#include "../linear.h"

namespace randlora {

// dW = scale * B (lambda * A * gamma), transposed unless `expand`; A and B follow from the signs
// (core/hadamard.h). Refers to the tensors that it is made of, which must live as long.
struct HadamardAdapter {
  // lam, gam, a_signs and row_signs may be those of several experts, each with another dimension in
  // front.
  const Tensor &lam, &gam;
  const Tensor &a_signs, &row_signs, &col_signs;
  bool expand;
  double scale;
  bool has_experts;
  HadamardSizes sizes;  // of one expert

  // Throws if anything disagrees.
  HadamardAdapter(const Tensor& lam, const Tensor& gam, const Tensor& a_signs,
                  const Tensor& row_signs, const Tensor& col_signs, bool expand, double scale);

  int64_t experts() const { return has_experts ? lam.size(0) : 1; }
  int64_t in() const { return expand ? sizes.d : sizes.D; }
  int64_t out() const { return expand ? sizes.D : sizes.d; }
};

// Throws unless `t` is (out, in), for each expert.
void check_weights(const Tensor& t, const char* name, const HadamardAdapter& adapter);

// Whether our kernels run on the device of `x`, and rows of B fit into their memory. Where not,
// plain torch computes (randlora_ext/ops/hadamard.py).
bool serves(const HadamardAdapter& adapter, const Tensor& x);

// The same arguments in an operator's schema. a_signs and row_signs hold the adapter's input scale,
// too (core/hadamard.h).
#define RANDLORA_HADAMARD_ADAPTER                                                \
  "Tensor lam, Tensor gam, Tensor a_signs, Tensor row_signs, Tensor col_signs, " \
  "bool expand, float scale"

}  // namespace randlora
