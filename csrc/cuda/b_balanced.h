// The B side of one operator call where B is balanced (b_balanced.cu), for up to p.T tokens at a time;
// what its products share is made on first use.
#pragma once
#include "balanced.h"
#include "kernels.h"

namespace randlora {
namespace cuda {

class BalancedCall {
 public:
  BalancedCall(const BSide& p, Device& device);

  void up(const void* V, int64_t T, void* y, bool accumulate);  // y (T, D) (+)= V (T, K) B^T
  void down(const void* x, int64_t T, void* U);                 // U (T, K) = x (T, D) B

 private:
  const Gathered& gathered();

  const BSide p_;
  Device& device_;
  int64_t part_;  // of the tokens of x that are panels at a time
  Gathered gathered_ = {};
  Panels panels_ = {};
  void* turned_ = nullptr;  // (T, r, n): V or U by group
};

}  // namespace cuda
}  // namespace randlora
