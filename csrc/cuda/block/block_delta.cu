// W' = W + scale * B A' for block bases in one pass: neither A' nor dW reaches memory.
//
// The block of W' for chunk g of the D features and chunk h of the d features sums over the rows c
// of A' in chunk h with c % groups == g (in a whole layer; BlockSizes describes slices). So it is a
// product of depth K / groups^2: 64 at 4096 x 4096, r = 32 and 8 groups.
//
// A thread block makes 128 of the D features by N of the d features (ternary_tile.h); slots are c.
// It starts to read its tile of W, decodes B's words, and forms
// A'[c, k] = lam[c] a[j, k] gam[i, k]; each element of A' serves 128 elements of W'. For 16-bit
// results, A' is the sum of two bf16 numbers: 16 bits of mantissa and the exponents of float32, so
// float16 needs no scaling.
//
// Floor: W read and W' written, 4 bytes an element in 16 bits. With several thread blocks per
// multiprocessor, the loads of one overlap the arithmetic of others, so a thread block has no
// pipeline of its own.
//
// Zeros outside the blocks are exact: inf and NaN in lam and gam reach only the elements of W' that
// depend on them.
#include <algorithm>

#include "../delta/delta_store.h"
#include "../device/launch.h"
#include "../device/ternary_io.h"
#include "../kernels.h"

namespace randlora {
namespace cuda {
namespace {

template <class S>
struct Work {
  using C = typename ComputeOf<S>::type;
  BlockSizesOf<int> sizes;
  int rows, height, width;  // of a chunk: a_rows, b_width, a_width
  int line_blocks, col_blocks;
  Planes b;
  const int8_t* a;
  const C *lam, *gam;
  DeltaStore<S> store;
  int64_t stride;  // between rows of W
  bool aligned;    // for 16-byte accesses
};

// Each element of A' is multiplied as the sum of kParts numbers of type E.
template <class S>
struct Operand {
  static constexpr int kParts = sizeof(S) == 2 ? 2 : 1;
  using E = std::conditional_t<kParts == 2, bf16, S>;
  static constexpr int N = sizeof(S) == 8 ? 32 : 64;
  using Tile = TernaryTile<E, N>;
  static constexpr int kStride = Tile::stride(kSlots);
};

template <class S>
struct SharedMemory {
  using C = typename ComputeOf<S>::type;
  using F = Operand<S>;
  using E = typename F::E;
  static constexpr int kTile = kLines * F::N, kPart = F::N * F::kStride;

  static int64_t bytes(bool transposed) {
    const int64_t loop = kCodeWords * 4 + F::kParts * kPart * int64_t(sizeof(E)) +
                         kSlots * int64_t(sizeof(C) + 2 * sizeof(int));
    const int64_t result =
        transposed ? store_bytes<true, typename F::Tile>() : store_bytes<false, typename F::Tile>();
    return kTile * int64_t(sizeof(S)) + std::max(loop, result);
  }
  static __device__ __forceinline__ S* base() { return reinterpret_cast<S*>(shared_memory()); }
  // From here on, the results later overwrite the operands.
  static __device__ __forceinline__ uint32_t* codes() {
    return reinterpret_cast<uint32_t*>(base() + kTile);
  }
  static __device__ __forceinline__ E* operand() {
    return reinterpret_cast<E*>(codes() + kCodeWords);
  }
  // For each slot: lambda, rank index j (negative: no row of A') and base i.
  static __device__ __forceinline__ C* lam() {
    return reinterpret_cast<C*>(operand() + F::kParts * kPart);
  }
  static __device__ __forceinline__ int* rank() { return reinterpret_cast<int*>(lam() + kSlots); }
  static __device__ __forceinline__ int* base_index() { return rank() + kSlots; }
};

// Where a block's tile lies: rows and columns count from the start of its two chunks.
struct Place {
  int64_t origin;
  int row0, col0, rows, cols;
};

// Copies a (Rows, Cols) tile of W to shared memory by cp.async.
template <int Rows, int Cols, class S>
__device__ __forceinline__ void load_base(S* to, const S* base, int64_t stride, const Place& at) {
  constexpr int V = kPerAccess<S>;
#pragma unroll
  for (int e = 0; e < Rows * Cols; e += kTileThreads * V) {
    const int row = (e + threadIdx.x * V) / Cols, col = (e + threadIdx.x * V) % Cols;
    if (at.row0 + row < at.rows && at.col0 + col < at.cols)
      cp_async16(to + row * Cols + col, base + int64_t{at.row0 + row} * stride + at.col0 + col);
  }
}

// The output that store_tile writes its sums to.
template <class S_, int Cols>
struct Result {
  using S = S_;
  using C = typename ComputeOf<S>::type;
  const DeltaStore<S>& store;
  const S* base;  // the tile of load_base, if aligned
  int64_t stride;
  const Place& at;
  bool aligned;

  __device__ __forceinline__ void put(int64_t row, int64_t col, const C (&v)[kPerAccess<S>]) const {
    constexpr int V = kPerAccess<S>;
    if (row >= at.rows || col >= at.cols) return;
    const int64_t e = at.origin + row * stride + col;
    if (aligned) {
      const S* old = base + (row - at.row0) * Cols + (col - at.col0);
      store.template run<V>(e, v, store.base ? old : nullptr);
    } else {
#pragma unroll 1
      for (int x = 0; x < V && col + x < at.cols; ++x) {
        C sum = C(0);
#pragma unroll
        for (int y = 0; y < V; ++y) sum = y == x ? v[y] : sum;  // registers cannot be indexed
        store.one(e + x, sum);
      }
    }
  }
};

// Writes the code words of 64 slots, for lines from line0 on. Slot s is row first + s * step of b;
// slots from `count` on are zero.
__device__ __forceinline__ void load_codes(uint32_t* codes, const Planes& b, int first, int step,
                                           int count, int line0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = lane / 16;
  const int slot = warp * 16 + row_of_lane(lane % 16), word = line0 / 64 + half;
  const int64_t at = (first + slot * step) * b.words + word;
  const bool inside = slot < count && word < b.words;
  uint32_t code[4];
  encode_columns(inside ? b.plus[at] : 0, inside ? ~b.plus[at] : 0, code);
#pragma unroll
  for (int m = 0; m < 4; ++m)
    codes[warp * kCodePitch + half * 64 + column_of_lane(lane % 16, m)] = code[m];
}

// Forms one column k of A' in the operand. If there are more threads than columns, threads share
// the slots of a column.
template <class S, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void form(const Work<S>& p, const C* gam, const int8_t* a, bool inside) {
  using Shared = SharedMemory<S>;
  using F = Operand<S>;
  using E = typename F::E;
  constexpr int V = kPerAccess<E>, kOfThread = kSlots * F::N / kTileThreads;
  const int first = threadIdx.x / F::N * kOfThread;
  E* to = Shared::operand() + threadIdx.x % F::N * F::kStride + first;
#pragma unroll 1
  for (int s = 0; s < kOfThread; s += V) {
    C v[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int slot = first + s + e, j = Shared::rank()[slot];
      v[e] = C(0);
      if (inside && j >= 0)
        v[e] = Shared::lam()[slot] * static_cast<C>(a[int64_t{j} * p.width]) *
               gam[int64_t{Shared::base_index()[slot]} * p.sizes.d];
    }
#pragma unroll
    for (int part = 0; part < F::kParts; ++part) {
      Pack<E, V> pack;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const E x = narrow<E>(v[e]);
        pack.set(e, x);
        if constexpr (F::kParts == 2) v[e] -= widen(x);
      }
      *reinterpret_cast<Pack<E, V>*>(to + part * Shared::kPart + s) = pack;
    }
  }
}

template <class S, bool Transposed>
__global__ void __launch_bounds__(kTileThreads, 3) block_delta_kernel(Work<S> p) {
  using Shared = SharedMemory<S>;
  using F = Operand<S>;
  constexpr int N = F::N, kRows = Transposed ? N : kLines, kCols = Transposed ? kLines : N;
  // Neighbouring blocks lie side by side in W.
  const int lines = p.line_blocks * p.sizes.b_chunks, cols = p.col_blocks * p.sizes.a_chunks;
  const int block = blockIdx.x, outer = block / (Transposed ? lines : cols),
            inner = block % (Transposed ? lines : cols);
  const int at_line = Transposed ? inner : outer, at_col = Transposed ? outer : inner;
  const int g = at_line / p.line_blocks, line0 = at_line % p.line_blocks * kLines;
  const int h = at_col / p.col_blocks, col0 = at_col % p.col_blocks * N;
  const int64_t corner = Transposed ? int64_t{h} * p.width * p.stride + g * p.height
                                    : int64_t{g} * p.height * p.stride + h * p.width;
  const Place at = Transposed ? Place{corner, col0, line0, p.width, p.height}
                              : Place{corner, line0, col0, p.height, p.width};
  if (p.store.base && p.aligned)
    load_base<kRows, kCols>(Shared::base(), p.store.base + corner, p.stride, at);
  cp_async_commit();

  // Rows c of A' that are in both chunks: first, first + groups, ... and the row e of the first.
  const int groups = p.sizes.groups, n = p.sizes.n;
  const int begin = h * p.rows, end = begin + p.rows, behind = (g + p.sizes.first - begin) % groups;
  const int first = begin + (behind < 0 ? behind + groups : behind);
  int e = (first - p.sizes.first) / groups * p.sizes.b_chunks + g;
  const int k = col0 + threadIdx.x % N;

  typename F::Tile tile;
  tile.warp.zero();
#pragma unroll 1
  for (int from = first; from < end; from += kSlots * groups, e += kSlots * p.sizes.b_chunks) {
    if (threadIdx.x < kSlots) {
      const int c = from + static_cast<int>(threadIdx.x) * groups;
      const bool inside = c < end;
      Shared::lam()[threadIdx.x] = inside ? p.lam[c] : 0;
      Shared::rank()[threadIdx.x] = inside ? c / n : -1;
      Shared::base_index()[threadIdx.x] = c % n;
    }
    load_codes(Shared::codes(), p.b, e, p.sizes.b_chunks, (end - from + groups - 1) / groups,
               line0);
    __syncthreads();
    form<S>(p, p.gam + h * p.width + k, p.a + k, k < p.width);
    __syncthreads();
    tile.template step<Order::by_line, F::kParts>(Shared::codes(), Shared::operand(), F::kStride,
                                                  Shared::kPart);
    __syncthreads();
  }
  cp_async_wait<0>();  // store_tile begins with the barrier
  store_tile<Transposed>(tile, reinterpret_cast<unsigned char*>(Shared::codes()), line0, col0,
                         Result<S, kCols>{p.store, Shared::base(), p.stride, at, p.aligned});
}

template <class S>
void form_blocks(const BlockDelta& w, Device& device) {
  using C = typename ComputeOf<S>::type;
  const auto small = [](int64_t size) { return static_cast<int>(size); };
  const int height = small(w.blocks.b_width()), width = small(w.blocks.a_width());
  Work<S> p{w.blocks.as<int>(),
            small(w.blocks.a_rows()),
            height,
            width,
            small(ceil_div(height, kLines)),
            small(ceil_div(width, Operand<S>::N)),
            w.blocks.b,
            w.blocks.a,
            static_cast<const C*>(w.lam),
            static_cast<const C*>(w.gam),
            DeltaStore<S>(w),
            w.transposed ? w.blocks.D : w.blocks.d,
            false};
  p.store.scale /= 2;  // codes stand for doubled numbers
  constexpr int V = kPerAccess<S>;
  p.aligned = p.store.aligned(V) && (w.transposed ? height : width) % V == 0;
  launch(device, "block_delta",
         w.transposed ? block_delta_kernel<S, true> : block_delta_kernel<S, false>,
         dim3(static_cast<unsigned>(w.blocks.b_chunks * p.line_blocks * w.blocks.a_chunks *
                                    p.col_blocks)),
         kTileThreads, SharedMemory<S>::bytes(w.transposed), p);
}

}  // namespace

void block_delta(const BlockDelta& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) { form_blocks<decltype(s)>(p, device); });
}

}  // namespace cuda
}  // namespace randlora
