// The B side of independent bases for B as bit planes, decoded in registers:
//
//   up     y (T, D) = V (T, K) B^T [+ y]      lines are rows of B
//   down   U (T, K) = x (T, D) B              lines are columns of B
//
// A block computes 128 lines of some tokens (ternary_tile.h), 16 if they are few. While it
// multiplies one step, cp.async brings the next step's tokens; the next step's plane words come
// through registers and become codes in the other half of shared memory. If there are fewer tiles
// than the card has room for, blocks share the contraction of a tile, and a second kernel adds
// their partial sums in order.
//
// Floor: D K / 4 bytes of planes, an eighth of a dense B in 16 bits, and the tokens; 2 T D K
// operations, of which mma.sync does not reach the peak. f32 and f64 use FMA.
//
// NaN and inf (ternary_tile.h) stay within their token with every engine.
#include <algorithm>

#include "../device/launch.h"
#include "../device/ternary_io.h"
#include "../kernels.h"

namespace randlora::cuda {
namespace {

// The plane words of `Tiles` successive 64-slot steps of 128 lines, held until they are stored.
template <bool Up, int Tiles>
struct PlaneWords {
  uint64_t plus[Tiles], minus[Tiles];

  __device__ __forceinline__ void load(const Planes& b, int64_t D, int64_t line0, int64_t slot0) {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      const int64_t row = Up ? line0 + item(i) / Tiles : slot0 + i * kSlots + row_in_step();
      const int64_t word = Up ? slot0 / 64 + item(i) % Tiles : line0 / 64 + half();
      const bool inside = row < D && word < b.words;
      plus[i] = inside ? b.plus[row * b.words + word] : 0;
      minus[i] = inside ? b.minus[row * b.words + word] : 0;
    }
  }

  __device__ __forceinline__ void store(uint32_t* codes) const {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      uint32_t word[4];
      if constexpr (Up) {
        encode_row(plus[i], minus[i], word);
        uint32_t* to = codes + item(i) % Tiles * kCodeWords + item(i) / Tiles;
#pragma unroll
        for (int q = 0; q < 4; ++q) to[q * kCodePitch] = word[q];
      } else {
        encode_columns(plus[i], minus[i], word);
        uint32_t* to = codes + i * kCodeWords + threadIdx.x / 32 * kCodePitch + half() * 64;
#pragma unroll
        for (int m = 0; m < 4; ++m) to[column_of_lane(threadIdx.x % 16, m)] = word[m];
      }
    }
  }

 private:
  // Up: a thread takes words of rows; neighbouring threads take neighbouring words.
  static __device__ __forceinline__ int item(int i) { return threadIdx.x + i * kTileThreads; }
  // Down: a warp takes 16 rows, a half-warp one of the two words that hold the 128 columns.
  static __device__ __forceinline__ int half() { return threadIdx.x % 32 / 16; }
  static __device__ __forceinline__ int row_in_step() {
    return threadIdx.x / 32 * 16 + row_of_lane(threadIdx.x % 16);
  }
};

template <class S>
struct Product {
  using C = ComputeOf<S>;
  Planes b;
  int64_t D, lines, depth, T;
  const S* tokens;  // (T, depth)
  bool aligned;
  int64_t line_blocks, token_blocks;
  int64_t splits, slots;  // blocks that share a tile, and the slots of each
  C* partial;             // (splits, T, lines), null if splits == 1
  Output<S> out;          // (T, lines)
};

// Steps of kSlots of the contraction that a thread block loads at a time: more if the tokens are
// few, to keep enough bytes in flight.
template <class S, int Tokens>
constexpr int kTiles = Tokens == 16 ? 8 / int(sizeof(S)) : 1;

template <class S, int Tokens>
struct SharedMemory {
  static constexpr int kStride = TernaryTile<S, Tokens>::stride(kTiles<S, Tokens> * kSlots);
  static constexpr int kCodes = kTiles<S, Tokens> * kCodeWords, kTokens = Tokens * kStride;
  static int64_t bytes() {
    const int64_t loop = 2 * (kCodes * int64_t(sizeof(uint32_t)) + kTokens * int64_t(sizeof(S)));
    return std::max(loop, store_bytes<TernaryTile<S, Tokens>>());
  }
  static __device__ __forceinline__ uint32_t* codes(int64_t half) {
    return reinterpret_cast<uint32_t*>(shared_memory()) + half * kCodes;
  }
  static __device__ __forceinline__ S* tokens(int64_t half) {
    return reinterpret_cast<S*>(codes(2)) + half * kTokens;
  }
};

template <class S, bool Up, int Tokens>
__global__ void __launch_bounds__(kTileThreads, 1) b_planes_kernel(Product<S> p) {
  using Shared = SharedMemory<S, Tokens>;
  constexpr int kStep = kTiles<S, Tokens> * kSlots;
  const int64_t tile_index = blockIdx.x % (p.line_blocks * p.token_blocks);
  const int64_t split = blockIdx.x / (p.line_blocks * p.token_blocks);
  const int64_t line0 = tile_index % p.line_blocks * kLines;
  const int64_t token0 = tile_index / p.line_blocks * Tokens;
  const int64_t first = split * p.slots, last = min(first + p.slots, p.depth);

  PlaneWords<Up, kTiles<S, Tokens>> words;
  const auto load = [&](int64_t slot, int64_t half) {
    words.load(p.b, p.D, line0, slot);
    load_operand<Tokens, kStep>(Shared::tokens(half), Shared::kStride, p.tokens, p.T, p.depth,
                                token0, slot, p.aligned);
    cp_async_commit();
  };
  TernaryTile<S, Tokens> tile;
  load(first, 0);
  words.store(Shared::codes(0));
#pragma unroll 1
  for (int64_t slot = first, half = 0; slot < last; slot += kStep, half ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const bool more = slot + kStep < last;
    if (more) load(slot + kStep, half ^ 1);
#pragma unroll
    for (int i = 0; i < kTiles<S, Tokens>; ++i)
      tile.step(Shared::codes(half) + i * kCodeWords, Shared::tokens(half) + i * kSlots,
                Shared::kStride);
    if (more) words.store(Shared::codes(half ^ 1));
  }

  using C = ComputeOf<S>;
  if (p.partial) {
    Output<C> sums{};
    sums.store = {p.partial + split * p.T * p.lines, nullptr, C(1)};
    sums.rows = p.T;
    sums.cols = p.lines;
    sums.aligned = p.lines % kPerAccess<C> == 0;
    store_tile(tile, shared_memory(), line0, token0, sums);
  } else {
    store_tile(tile, shared_memory(), line0, token0, p.out);
  }
}

template <class S, int Tokens>
void run(Product<S>& p, bool up, Device& device) {
  using C = ComputeOf<S>;
  constexpr int64_t kStep = kTiles<S, Tokens> * kSlots;
  p.line_blocks = ceil_div(p.lines, kLines), p.token_blocks = ceil_div(p.T, Tokens);
  const int64_t tiles = p.line_blocks * p.token_blocks, steps = ceil_div(p.depth, kStep);
  // Two blocks per multiprocessor if memory bounds the time (few tokens), one if arithmetic does.
  const int64_t wanted = (Tokens == 16 ? 2 : 1) * device.multiprocessors / tiles;
  p.slots = ceil_div(steps, std::max<int64_t>(1, std::min(wanted, steps))) * kStep;
  p.splits = ceil_div(p.depth, p.slots);
  p.partial = p.splits > 1 ? scratch<C>(device, p.splits * p.T * p.lines) : nullptr;
  launch(device, up ? "b_up_planes" : "b_down_planes",
         up ? b_planes_kernel<S, true, Tokens> : b_planes_kernel<S, false, Tokens>,
         tiles * p.splits, kTileThreads, SharedMemory<S, Tokens>::bytes(), p);
  if (p.partial) sum_parts(p.partial, p.splits, p.T * p.lines, p.out.store, device);
}

}  // namespace

void b_planes(const BSide& side, Device& device) {
  if (side.T == 0) return;
  const TernaryBases& b = side.basis;
  with_dtype(side.dtype, [&](auto storage) {
    using S = decltype(storage);
    Product<S> p{};
    p.b = b.b_planes;
    p.D = b.D;
    p.T = side.T;
    p.lines = side.up ? b.D : b.K();
    p.depth = side.up ? b.K() : b.D;
    p.tokens = static_cast<const S*>(side.from);
    p.aligned = aligned_rows(p.depth, kPerAccess<S>, side.from);
    S* to = static_cast<S*>(side.to);
    // Codes stand for doubled numbers.
    p.out.store = {to, side.accumulate ? to : nullptr, typename Product<S>::C(0.5)};
    p.out.rows = p.T;
    p.out.cols = p.lines;
    p.out.aligned = aligned_rows(p.lines, kPerAccess<S>, to);
    // Half a full tile if full ones would not fill the card twice.
    if (p.T <= 16) return run<S, 16>(p, side.up, device);
    if constexpr (kColumns<S> == 128)
      if (ceil_div(p.lines, kLines) * ceil_div(p.T, 128) < 2 * device.multiprocessors)
        return run<S, 64>(p, side.up, device);
    run<S, kColumns<S>>(p, side.up, device);
  });
}

}  // namespace randlora::cuda
