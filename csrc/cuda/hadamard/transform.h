// The Hadamard transform of rows of N numbers, N a power of two, in passes of several bits.
//
// A transform over one bit of the positions replaces every pair of numbers whose positions differ
// in that bit alone by their sum and difference; transforms over different bits commute. So a pass
// takes a few bits: each thread reads kValues numbers, whose positions differ in these bits alone,
// transforms them in registers and writes them back. Nobody else touches them in between. Several
// rows lie one behind the other and are transformed as one array: the bits of a row's number are
// left out.
//
//   bits [0, kBits)                low: 128 adjacent bytes a thread; also multiplies by factors
//   bits [kBits, log - kEdgeBits)  middle, in up to kBits bits at a time
//   bits [log - kEdgeBits, log)    the edge, where rows come from or go to global memory in
//                                  accesses of 16 bytes
//
// In shared memory, 16 bytes are left free after every 128: without them all threads of the low
// pass would meet in four banks.
#pragma once
#include <algorithm>

#include "../../core/hadamard.h"
#include "../device/columns.h"
#include "../device/launch.h"

namespace randlora::cuda {

template <class C>
constexpr int kBits = sizeof(C) == 8 ? 4 : 5;
template <class C>
constexpr int kValues = 1 << kBits<C>;  // 128 bytes

constexpr int kThreads = 256;  // most of a block

constexpr int log_of(int64_t power) {
  int log = 0;
  while (int64_t{1} << log < power) ++log;
  return log;
}

// The bits of the edge of rows that are S in global memory.
template <class S>
constexpr int kEdgeBits = kBits<ComputeOf<S>> - log_of(kPerAccess<S>);

// Over the bits of e / Apart, where v[e].
template <int Apart, int Count, class C>
__device__ __forceinline__ void hadamard(C (&v)[Count]) {
#pragma unroll
  for (int half = Apart; half < Count; half *= 2)
#pragma unroll
    for (int e = 0; e < Count; ++e)
      if (!(e & half)) {
        const C a = v[e], b = v[e + half];
        v[e] = a + b;
        v[e + half] = a - b;
      }
}

// Where the numbers of several rows lie in shared memory.
template <class C>
struct Rows {
  static constexpr int kFree = kPerAccess<C>;
  C* numbers;

  RANDLORA_HD_MEMBER static int64_t bytes(int64_t count) {
    return count / kValues<C> * (kValues<C> + kFree) * int64_t{sizeof(C)};
  }
  __device__ __forceinline__ C* at(int x) const { return numbers + x + (x >> kBits<C>)*kFree; }
  __device__ __forceinline__ Rows row(int number, int log) const { return {at(number << log)}; }
  // at(x + (1 << bit)) - at(x), for bit >= kBits
  __device__ __forceinline__ static int step(int bit) {
    return (1 << bit) + (1 << (bit - kBits<C>)) * kFree;
  }
};

// Bits [0, kBits). work(v, x, c) transforms the numbers from position x on, c in their row, by
// hadamard<1>, and may change them before and after. Past the K columns of B they become zero.
template <class C, class Work>
__device__ __forceinline__ void low_pass(const Rows<C>& rows, int log, int count, int64_t K,
                                         const Work& work) {
  for (int g = threadIdx.x; g < count << log >> kBits<C>; g += blockDim.x) {
    const int x = g * kValues<C>, c = x & ((1 << log) - 1);
    C v[kValues<C>] = {};
    C* at = rows.at(x);
    if (c < K) {
      load_run<kValues<C>>(at, v);
      work(v, x, c);
    }
    store_run<kValues<C>>(v, at);
  }
}

// lam[c] col_signs[c] in the order in which the low pass reads them. A thread has a group of
// kValues adjacent c, and its lanes read the first 16 bytes of each group, then the second, and so
// on: in the order of c they would lie 128 bytes apart, each in a sector of its own.
template <class C>
struct Factors {
  static constexpr int kWidth = kPerAccess<C>;
  C* numbers;
  int K, groups;

  RANDLORA_HD_MEMBER Factors(const HadamardSizes& sizes, const void* numbers_)
      : numbers(static_cast<C*>(const_cast<void*>(numbers_))),
        K(static_cast<int>(sizes.K())),
        groups((K + kValues<C> - 1) / kValues<C>) {}

  // The factor of c, which may lie in the last group behind K.
  __device__ __forceinline__ C* at(int c) const {
    const int in_group = c % kValues<C>;
    return numbers + (in_group / kWidth * groups + c / kValues<C>)*kWidth + in_group % kWidth;
  }
  // v[e] *= the factor of c + e, and zero past K. c begins a group.
  __device__ __forceinline__ void apply(C (&v)[kValues<C>], int c) const {
    const C* from = at(c);
#pragma unroll
    for (int e = 0; e < kValues<C>; e += kWidth, from += groups * kWidth) {
      C factors[kWidth];
      load_run<kWidth>(from, factors);
#pragma unroll
      for (int u = 0; u < kWidth; ++u) v[e + u] *= factors[u];
      // Not all loads at once: registers do not suffice.
      if ((e + kWidth) % 16 == 0) asm volatile("" ::: "memory");
    }
    if (c + kValues<C> <= K) return;
#pragma unroll
    for (int e = 0; e < kValues<C>; ++e)
      if (c + e >= K) v[e] = C(0);  // times a factor it could be NaN
  }
};

// Bits [bit, bit + bits), bit >= kBits, at most kBits of them; the pass is compiled for each Bits.
// With `First` bit is kBits, a constant.
template <bool First, class C, int Bits = kBits<C>>
__device__ __forceinline__ void middle_pass(const Rows<C>& rows, int bit, int bits, int numbers) {
  if constexpr (Bits > 1)
    if (bits < Bits) return middle_pass<First, C, Bits - 1>(rows, bit, bits, numbers);
  if (First) bit = kBits<C>;
  constexpr int kWidth = 1 << (kBits<C> - Bits);
  const int step = rows.step(bit);
  for (int g = threadIdx.x; g < numbers / kValues<C>; g += blockDim.x) {
    C v[kValues<C>];
    C* at = rows.at((g * kWidth >> bit << (bit + Bits)) | (g * kWidth & ((1 << bit) - 1)));
    C* from = at;
#pragma unroll
    for (int e = 0; e < 1 << Bits; ++e, from += step) load_run<kWidth>(from, v + e * kWidth);
    hadamard<kWidth>(v);
#pragma unroll
    for (int e = 0; e < 1 << Bits; ++e, at += step) store_run<kWidth>(v + e * kWidth, at);
  }
}

// The bits between the low pass and the edge, in as few passes as hold them. Every pass ends with a
// barrier.
template <class C>
__device__ __forceinline__ void middle_passes(const Rows<C>& rows, int log, int edge, int count) {
  const int bits = log - kBits<C> - edge, passes = (bits + kBits<C> - 1) / kBits<C>;
  for (int s = 0; s < passes; ++s) {
    const int begin = bits * s / passes, end = bits * (s + 1) / passes;
    if (s == 0)
      middle_pass<true>(rows, kBits<C>, end, count);
    else
      middle_pass<false>(rows, kBits<C> + begin, end - begin, count);
    __syncthreads();
  }
}

// ---- the edge -----------------------------------------------------------------------------------

// The columns of a thread at the edge: it holds kValues numbers, kWidth for each
// e < 1 << kEdgeBits,
//
//   v[e * kWidth + u]  at position  row * N + at(e, u)
//
// Its columns are adjacent if the matrix in global memory allows accesses of 16 bytes; otherwise
// neighbouring threads have adjacent columns.
template <class S, bool Aligned>
struct Edge {
  using C = ComputeOf<S>;
  static constexpr int kWidth = kPerAccess<S>, kCount = 1 << kEdgeBits<S>;
  int row, first, apart, log;

  // Item g of those that `count / kValues` numbers make.
  __device__ __forceinline__ Edge(int g, int log_) : log(log_) {
    const int of_row = log - kBits<C>;  // bits of items in a row
    const int item = g & ((1 << of_row) - 1);
    row = g >> of_row;
    apart = Aligned ? 1 : min(32, 1 << of_row);
    first = Aligned ? item * kWidth : item / apart * apart * kWidth + item % apart;
  }
  // The position of v[e * kWidth + u] in its row.
  __device__ __forceinline__ int at(int e, int u = 0) const {
    return first + u * apart + (e << (log - kEdgeBits<S>));
  }
  // v[e * kWidth + u] for all u, in rows of which these `end` are left.
  __device__ __forceinline__ Columns<kWidth, Aligned> columns(int e, int end) const {
    Columns<kWidth, Aligned> c(0, 0, end);
    c.first = at(e), c.apart = apart;
    return c;
  }

  __device__ __forceinline__ void load(const Rows<C>& rows, C (&v)[kValues<C>]) const {
    const auto from = rows.row(row, log);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if constexpr (Aligned) {
        load_run<kWidth>(from.at(at(e)), v + e * kWidth);
      } else {
#pragma unroll
        for (int u = 0; u < kWidth; ++u) v[e * kWidth + u] = *from.at(at(e, u));
      }
    }
  }
  __device__ __forceinline__ void store(const C (&v)[kValues<C>], const Rows<C>& rows) const {
    const auto to = rows.row(row, log);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if constexpr (Aligned) {
        store_run<kWidth>(v + e * kWidth, to.at(at(e)));
      } else {
#pragma unroll
        for (int u = 0; u < kWidth; ++u) *to.at(at(e, u)) = v[e * kWidth + u];
      }
    }
  }
};

// ---- how the host divides the work --------------------------------------------------------------

template <class S>
struct Plan {
  using C = ComputeOf<S>;
  int log;   // of N, at least what the low pass and the edge take
  int rows;  // of a block
  int threads;
  int64_t shared;  // bytes

  // A block has `copies` of its rows, at most `most`.
  Plan(const HadamardSizes& sizes, int64_t most, const Device& device, int copies = 1)
      : log(std::max(log_of(sizes.N()), kBits<C> + kEdgeBits<S>)) {
    const int64_t of_row = int64_t{1} << (log - kBits<C>);
    rows = 1;
    while (rows * of_row < 128 && 2 * rows <= most) rows *= 2;  // short rows share a block
    threads = static_cast<int>(
        std::clamp<int64_t>(rows * of_row, 32, std::min(device.max_threads, kThreads)));
    shared = copies * Rows<C>::bytes(int64_t{rows} << log);
  }
};

}  // namespace randlora::cuda
