// The B side of the factored path for a balanced B, whose columns fall into r groups by c % r, all n
// columns of a group having the same rows S_g (core/balanced.h):
//
//   up     y[t, o_p]      += sum_i sign[p, i] V[t, i r + g]         p in S_g
//   down   U[t, i r + g]   = sum_{p in S_g} sign[p, i] x[t, o_p]
//
// These are the gathered products of the A side (support.h) with signs for values, so a_down.cu and
// a_up.cu compute them. A's rank index j has columns j n + i, a group of B has i r + g: V and U are
// turned in between, token by token.
//
// 4096 x 4096, r = 32, n = 128, T = 8192, q = 4 (1/8), bf16 on an H100: 34 GFLOP each, 53 us at the rate
// of a GEMM. L2 binds both: down takes 3/8 of what a_up.cu does at density 1/3, 105 us; up reads V for
// each of nine ranges of columns, at any density, and 4.2 MB of signs for each of 128 tiles of tokens,
// 600 + 540 MB, 210 us. Each stands behind or before a turn of 67 MB in and out, 40 us at 3.35 TB/s,
// less where a chunk stays in L2; down takes panels of x besides, 25 us. A GEMM with a dense B takes
// 423 us each way.
#include "b_balanced.h"
#include "columns.h"

namespace randlora {
namespace cuda {
namespace {

constexpr int kTile = 32;

// A row of the tile is an odd number of 32-bit words (of doubles: of doubles).
template <class S>
constexpr int kStride = kTile + (sizeof(S) == 2 ? 2 : 1);

// to[t][c][a] = from[t][a][c], (rows, cols) of every token; a block turns a tile of one.
template <class S>
__global__ void turn_kernel(const S* __restrict__ from, int64_t rows, int64_t cols,
                            S* __restrict__ to) {
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kTile, kStride)
  const int64_t across = ceil_div(cols, kTile), tiles = across * ceil_div(rows, kTile);
  const int64_t t = blockIdx.x / tiles, number = blockIdx.x % tiles;
  const int64_t a0 = number / across * kTile, c0 = number % across * kTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  from += t * rows * cols, to += t * rows * cols;
  if (c0 + lane < cols)
    for (int a = warp; a < min(int64_t{kTile}, rows - a0); a += warps)
      tile[a * kStride<S> + lane] = from[(a0 + a) * cols + c0 + lane];
  __syncthreads();
  if (a0 + lane < rows)
    for (int c = warp; c < min(int64_t{kTile}, cols - c0); c += warps)
      to[(c0 + c) * rows + a0 + lane] = tile[lane * kStride<S> + c];
}

void turn(const void* from, int64_t T, int64_t rows, int64_t cols, void* to, DType dtype,
          Device& device) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t blocks = T * ceil_div(rows, kTile) * ceil_div(cols, kTile);
    launch(device, "turn", turn_kernel<S>, dim3(static_cast<unsigned>(blocks)),
           min(256, device.max_threads), kTile * kStride<S> * int64_t{sizeof(S)}, from, rows, cols,
           to);
  });
}

}  // namespace

// Parts as on the A side, so that panels and what is made of them stay in L2.
BalancedCall::BalancedCall(const BSide& p, Device& device) : p_(p), device_(device) {
  const int64_t tokens = device.chunk_bytes / 4 / (p.basis.D * bytes_of(p.dtype));
  part_ = min(p.T, max(tokens / 128, int64_t{1}) * 128);
}

const Gathered& BalancedCall::gathered() {
  const Basis& b = p_.basis;
  if (!gathered_.values) {
    const Support s = support_of(b.b_balanced, b.D, b.r, b.n, device_);
    gathered_ = {s, sign_values(b.b_balanced, s, p_.dtype, device_), p_.dtype};
    turned_ = device_.scratch(static_cast<size_t>(p_.T * b.K() * bytes_of(p_.dtype)));
  }
  return gathered_;
}

void BalancedCall::up(const void* V, int64_t T, void* y, bool accumulate) {
  if (T == 0) return;
  const Gathered& g = gathered();
  turn(V, T, p_.basis.n, p_.basis.r, turned_, p_.dtype, device_);
  gathered_down(g, turned_, T, y, accumulate, device_);
}

void BalancedCall::down(const void* x, int64_t T, void* U) {
  if (T == 0) return;
  const Basis& b = p_.basis;
  const int64_t bytes = bytes_of(p_.dtype);
  const Gathered& g = gathered();
  if (!panels_.data) panels_ = make_panels(part_, b.D, part_ > 32 ? 64 : 32, p_.dtype, device_);
  for (int64_t t = 0; t < T; t += part_) {
    const int64_t tokens = min(part_, T - t);
    fill_panels(static_cast<const char*>(x) + t * b.D * bytes, tokens, panels_, p_.dtype, device_);
    gathered_up(g, nullptr, 1, panels_, tokens, static_cast<char*>(turned_) + t * b.K() * bytes,
                device_);
  }
  turn(turned_, T, b.r, b.n, U, p_.dtype, device_);
}

}  // namespace cuda
}  // namespace randlora
