// Products with block bases, in batches of G dense blocks by torch's GEMM. Our kernels make the
// blocks of A' and contract the gradient of A', and on CUDA form W + dW in one pass. All take
// contiguous tensors; x, y, dy and dx are (T, features) in `dtype`.
//
// Cost: 2 T K d / G operations for each product of a side, of which forward has two and backward
// four or five.
#pragma once
#include "common.h"

namespace randlora {

// y += scale * x dW^T, or y = ... unless `accumulate`. d is the input side if `expand`. On CUDA
// without a dense B, which is for a few tokens, from the packed blocks themselves.
void block_linear(const BlockBasis& b, const Tensor& lam, const Tensor& gam, const Tensor& x,
                  Tensor& y, int64_t T, double scale, bool expand, bool accumulate);

// dx += scale * dy dW, or dx = ... unless `accumulate`, if `dx`; (dlam, dgam) in the types of lam
// and gam, if `need_diagonals`.
std::tuple<Tensor, Tensor> block_linear_backward(const BlockBasis& b, const Tensor& lam,
                                                 const Tensor& gam, const Tensor& x,
                                                 const Tensor& dy, Tensor* dx, int64_t T,
                                                 double scale, bool expand, bool accumulate,
                                                 bool need_diagonals);

}  // namespace randlora
