// What the CUDA kernels make of a balanced matrix (balanced.h) in scratch memory, a call at a time.
//
//   find_lines      thread (g, line): a binary search tells whether the line is in the group, and how
//                   many come before it
//   spread_signs    thread (entry, 16 bytes of bases): bits become +1 and -1
//   planes_kernel   thread (line, 64 columns): a word of both bit planes
//
// 4096 lines, r = 32, q = 4, n = 128 on an H100: find_lines writes 0.5 MB after 12 dependent reads that
// hit caches, 3 us; spread_signs writes 4 MB in 16 bits, 2 us from L2; the planes are 4 MB, of two reads
// an element, 34 M in L1: some 10 us.
#include "balanced.h"
#include "columns.h"
#include "kernels.h"

namespace randlora {
namespace cuda {
namespace {

__global__ void find_lines(Balanced b, Support s) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= s.r * s.d) return;
  const int64_t g = x / s.d, line = x % s.d, first = s.first(g), size = s.size(g);
  const int64_t p = b.first(g, line), before = p - b.offset[g];
  const bool is_in = before < size && b.line(p) == line;
  if (is_in) s.entry[first + before] = static_cast<int32_t>(2 * line);
  s.at[x] = static_cast<int32_t>(is_in ? 2 * before : -1 - before);
  for (int64_t q = size + line; q < ceil_div(size, kGroup) * kGroup; q += s.d)
    s.entry[first + q] = -1;
}

template <class S>
__global__ void spread_signs(Balanced b, Support s, S* __restrict__ values) {
  using C = typename ComputeOf<S>::type;
  constexpr int L = kPerAccess<S>;
  const int64_t group = blockIdx.x, g = s.rank_of_tile(group, kGroup);
  const int64_t e0 = group * kGroup - s.first(g), size = s.size(g), pieces = s.bases / L;
  if (e0 >= size) return;
  for (int64_t x = threadIdx.x; x < kGroup * pieces; x += blockDim.x) {
    const int64_t e = e0 + x / pieces, i = x % pieces * L;
    const uint32_t bits =
        e < size && i < s.n ? b.sign[(b.offset[g] + e) * b.words + i / 32] >> (i % 32) : 0;
    Pack<S, L> pack = {};
#pragma unroll
    for (int v = 0; v < L; ++v)
      if (e < size && i + v < s.n) pack.set(v, narrow<S>(bits >> v & 1 ? C(-1) : C(1)));
    pack.store(values + (s.first(g) + e) * s.bases + i);
  }
}

__global__ void planes_kernel(Balanced b, Support s, int64_t words, uint64_t* plus,
                              uint64_t* minus) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= s.d * words) return;
  const int64_t line = x / words, first = x % words * 64;
  int64_t i = first / s.r, g = first % s.r;  // column i r + g
  uint64_t present = 0, negative = 0;
  for (int bit = 0; bit < 64 && i < s.n; ++bit) {
    const int32_t code = s.at[g * s.d + line];
    if (code >= 0) {
      const int64_t p = b.offset[g] + code / 2;
      present |= uint64_t{1} << bit;
      negative |= uint64_t{b.sign[p * b.words + i / 32] >> (i % 32) & 1} << bit;
    }
    if (++g == s.r) g = 0, ++i;
  }
  plus[x] = present & ~negative;
  minus[x] = negative;
}

}  // namespace

Support support_of(const Balanced& b, int64_t lines, int64_t r, int64_t n, Device& device) {
  Support s = {};
  s.offset = b.offset, s.r = r, s.n = n, s.d = lines;
  s.bases = ceil_div(n, 8) * 8, s.count = b.count;
  s.entry = scratch<int32_t>(device, s.room());
  s.at = scratch<int32_t>(device, s.r * s.d);
  const int threads = min(256, device.max_threads);
  launch(device, "find_lines", find_lines,
         dim3(static_cast<unsigned>(ceil_div(s.r * s.d, threads))), threads, 0, b, s);
  return s;
}

const void* sign_values(const Balanced& b, const Support& s, DType dtype, Device& device) {
  void* values = nullptr;
  with_dtype(dtype, [&](auto storage) {
    using S = decltype(storage);
    values = scratch<S>(device, s.room() * s.bases);
    launch(device, "spread_signs", spread_signs<S>, dim3(static_cast<unsigned>(s.tiles(kGroup))),
           min(256, device.max_threads), 0, b, s, values);
  });
  return values;
}

void balanced_to_planes(const Balanced& b, int64_t rows, int64_t r, int64_t n, uint64_t* plus,
                        uint64_t* minus, Device& device) {
  if (rows == 0) return;
  const Support s = support_of(b, rows, r, n, device);
  const int64_t words = words_of(r * n);
  const int threads = min(256, device.max_threads);
  launch(device, "balanced_to_planes", planes_kernel,
         dim3(static_cast<unsigned>(ceil_div(rows * words, threads))), threads, 0, b, s, words,
         plus, minus);
}

}  // namespace cuda
}  // namespace randlora
