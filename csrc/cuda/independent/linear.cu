// A linear layer on independent bases (equations in docs/math.md): products with A' and with B, its
// A side and its B side, in turn. dW is never formed.
//
//   up     V = s from A'^T (T, K),   to (+)= V B^T
//   down   U = from B (T, K),        to (+)= s U A'
//   dlam and dgam from U = B^T of the operand on the D side, and the one on the d side
//
// Tokens are processed in chunks (Device::chunk_bytes of V or U), so scratch does not grow with T;
// dlam and dgam accumulate chunk by chunk, in order. V and U have the dtype of x.
//
// Floor: each B product is 2 T D K operations if B is planes, T nnz(B) additions if it is lists;
// each A product 2 T n nnz(A) operations.
#include "a_side.h"

namespace randlora::cuda {
namespace {

// Memory for the B side, which asks once for each product: the first chunk's serves the next ones,
// too, because the stream runs them in order.
class ReusedScratch : public Device {
 public:
  explicit ReusedScratch(Device& device) : Device(device), device_(device) {}
  void* scratch(size_t bytes) override {
    if (bytes_ < bytes) memory_ = device_.scratch(bytes), bytes_ = bytes;
    return memory_;
  }

 private:
  Device& device_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

void independent_linear(const IndependentLinear& p, Device& device) {
  const TernaryBases& b = p.basis;
  const bool grads = p.dlam != nullptr;
  if (!grads && (!p.to || p.T == 0)) return;
  const int64_t chunk = tokens_within(device.chunk_bytes, p.T, b.K(), p.dtype);  // of V or U
  ASideCall a(p, chunk, device);
  void* between = device.scratch(static_cast<size_t>(chunk * b.K() * bytes_of(p.dtype)));
  // The operands on the d side and on the D side.
  const void *small = p.up ? p.from : p.other, *large = p.up ? p.other : p.from;
  ReusedScratch reused(device);
  const auto b_side = b.has_planes() ? b_planes : b_lists;
  int64_t t = 0;
  do {  // once if T is 0
    const int64_t T = min(chunk, p.T - t);
    if (p.up || grads) a.set_operand(moved(small, t * b.d, p.dtype), T);
    if (p.up && p.to) {
      a.up(between);
      BSide up{b};
      up.dtype = p.dtype;
      up.T = T;
      up.up = true;
      up.from = between;
      up.to = moved(p.to, t * b.D, p.dtype);
      up.accumulate = p.accumulate;
      b_side(up, reused);
    }
    if (!p.up || grads) {
      BSide down{b};
      down.dtype = p.dtype;
      down.T = T;
      down.from = moved(large, t * b.D, p.dtype);
      down.to = between;
      b_side(down, reused);
    }
    if (!p.up && p.to) a.down(between, T, moved(p.to, t * b.d, p.dtype), p.accumulate);
    if (grads) a.grad(between, p.dlam, p.dgam, t > 0);
    t += chunk;
  } while (t < p.T);
}

}  // namespace randlora::cuda
