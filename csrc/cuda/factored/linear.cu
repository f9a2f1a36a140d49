// The factored path (equations in docs/math.md): products of the two sides, dW never formed.
//
//   linear            expand (d == in)   V = s x A'^T (T, K),   y (+)= V B^T
//                     reduce (d == out)  U = x B (T, K),        y (+)= s U A'
//   linear_backward   expand             U = dy B,            dx (+)= s U A',  dlam, dgam from U, x
//                     reduce             V = s dy A'^T,       dx (+)= V B^T
//                                        U = x B,             dlam, dgam from U, dy
//
// Tokens are processed in chunks (Device::chunk_bytes of V or U), so scratch does not grow with T;
// dlam and dgam accumulate chunk by chunk, in order. V and U have the dtype of x.
//
// Floor: each B product is 2 T D K operations if B is planes, T nnz(B) additions if it is lists;
// each A product 2 T n nnz(A) operations.
#include <vector>

#include "a_side.h"

namespace randlora::cuda {
namespace {

// Rows of (T, features) matrices from token t on.
const void* from(const void* p, int64_t t, int64_t features, DType dtype) {
  return static_cast<const char*>(p) + t * features * bytes_of(dtype);
}
void* from(void* p, int64_t t, int64_t features, DType dtype) {
  return static_cast<char*>(p) + t * features * bytes_of(dtype);
}

// Reuses the first chunk's scratch for the next chunks, which the stream runs in order.
class ScratchReuse : public Device {
 public:
  explicit ScratchReuse(Device& device) : Device(device), device_(device) {}
  void* scratch(size_t bytes) override {
    if (next_ == held_.size()) held_.push_back({nullptr, 0});
    Block& block = held_[next_++];
    if (block.bytes < bytes) block = {device_.scratch(bytes), bytes};
    return block.memory;
  }
  void next_chunk() { next_ = 0; }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  Device& device_;
  std::vector<Block> held_;
  size_t next_ = 0;
};

// Tokens of a chunk, in whole tiles: their V or U takes at most chunk_bytes.
int64_t chunk_of(const Basis& b, int64_t T, DType dtype, const Device& device) {
  const int64_t tokens = device.chunk_bytes / (b.K() * bytes_of(dtype));
  const int64_t most = max(tokens / 128, int64_t{1}) * 128;
  return min(T, most);
}

// A product of the B side for a chunk of tokens, by the form of B.
void b_side(const BSide& p, ScratchReuse& device) {
  device.next_chunk();
  (p.basis.has_planes() ? b_planes : b_lists)(p, device);
}

}  // namespace

void linear(const Linear& p, Device& device) {
  const Basis& b = p.basis;
  if (p.T == 0) return;
  const int64_t chunk = chunk_of(b, p.T, p.dtype, device);
  ASideCall a({b, p.lam, p.gam, p.dtype, chunk}, p.scale, device);
  void* between = device.scratch(static_cast<size_t>(chunk * b.K() * bytes_of(p.dtype)));
  ScratchReuse reuse(device);
  each_chunk(p.T, chunk, [&](int64_t t, int64_t T) {
    if (p.expand) {
      a.set_operand(from(p.x, t, b.d, p.dtype), T);
      a.up(between);
      b_side({b, p.dtype, T, true, between, from(p.y, t, b.D, p.dtype), p.accumulate}, reuse);
    } else {
      b_side({b, p.dtype, T, false, from(p.x, t, b.D, p.dtype), between, false}, reuse);
      a.down(between, T, from(p.y, t, b.d, p.dtype), p.accumulate);
    }
  });
}

void linear_backward(const LinearBackward& p, Device& device) {
  const Basis& b = p.basis;
  const bool grads = p.dlam != nullptr;
  if (!grads && (!p.dx || p.T == 0)) return;
  const int64_t chunk = chunk_of(b, p.T, p.dtype, device);
  ASideCall a({b, p.lam, p.gam, p.dtype, chunk}, p.scale, device);
  void* between = device.scratch(static_cast<size_t>(chunk * b.K() * bytes_of(p.dtype)));
  // The operands on the d side and on the D side.
  const void *z = p.expand ? p.x : p.dy, *large = p.expand ? p.dy : p.x;
  ScratchReuse reuse(device);
  each_chunk(p.T, chunk, [&](int64_t t, int64_t T) {
    a.set_operand(from(z, t, b.d, p.dtype), T);
    if (!p.expand && p.dx) {
      a.up(between);
      b_side({b, p.dtype, T, true, between, from(p.dx, t, b.D, p.dtype), p.accumulate}, reuse);
    }
    if (!p.expand && !grads) return;
    b_side({b, p.dtype, T, false, from(large, t, b.D, p.dtype), between, false}, reuse);
    if (p.expand && p.dx) a.down(between, T, from(p.dx, t, b.d, p.dtype), p.accumulate);
    if (grads) a.grad(between, p.dlam, p.dgam, t > 0);
  });
}

}  // namespace randlora::cuda
