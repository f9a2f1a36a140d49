// Products with block bases: torch's GEMM multiplies batches of G dense blocks. Our kernels make
// the blocks of A' and contract the gradient of A', and on CUDA form W + dW in one pass. All take
// contiguous tensors; x, y, dy and dx are (T, features) in the dtype of x.
//
// Cost: 2 T K d / G operations for a product with A', 2 T K D / G for one with B. Forward has two
// products, backward three (expand) or four.
#pragma once
#include "common.h"

namespace randlora {

// y += scale * x dW^T, or y = ... unless `accumulate`. d is the input side if `expand`. On CUDA,
// if there is no dense B, a few tokens are multiplied by the packed blocks directly.
void block_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate);

// If `dx` is not null, dx += scale * dy dW, or dx = ... unless `accumulate`. If `need_diagonals`,
// returns (dlam, dgam) in the types of lam and gam.
std::tuple<Tensor, Tensor> block_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals);

}  // namespace randlora
