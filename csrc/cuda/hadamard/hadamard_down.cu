// u[t, c] = sum over o of row[o] H[o, c] y[t, o], with c = j * n + i, and from it
//
//   w[m, t, i] = scale * sum over j of H[j, m] col[c] lam[c] u[t, c]
//   sums[q, c] = sum over the tokens t of slot q of u[t, c] * sum over m of H[j, m] z[m, t, i]
//
// hadamard_up backwards. Rows o and o + N of H are equal, so the elements of y with equal o modulo
// N are added first, and the transform has N numbers however large D is.
//
// Without sums a thread block takes one token, or several if rows are short. With sums it takes a
// slot and walks its tokens; it mixes z into a second part of shared memory and keeps the sums in a
// third, where always the same thread adds to an element: nobody else touches it, and the order is
// that of the tokens.
//
// Floor: y (and z) read and w written once.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"
#include "scratch.h"

namespace randlora::cuda {
namespace {

template <class S, bool Aligned, bool Scratch, class C = ComputeOf<S>>
__device__ __forceinline__ void read_y(const HadamardDown& p, const Rows<C, Scratch>& rows, int log,
                                       int64_t t0, int64_t tokens, const Share& share) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const int64_t D = p.sizes.D, items = tokens << log >> kBits<C>;
  const int N = 1 << log, first_row = static_cast<int>(p.sizes.first_row & (N - 1));
  for (int64_t g = share.first; g < items; g += share.step) {
    const At at(g, log);
    const S* y = static_cast<const S*>(p.y) + (t0 + at.row) * D;
    const int8_t* row = p.row;
    C v[kValues<C>];
#pragma unroll
    for (int e = 0; e < kValues<C>; ++e) v[e] = C(0);
#pragma unroll 1
    for (int64_t left = D; left > 0; left -= N, y += N, row += N) {
      const int end = static_cast<int>(min(left, int64_t{N}));
#pragma unroll
      for (int e = 0; e < At::kCount; ++e) {
        if constexpr (Aligned) {
          const int o = at.row_of(e, 0, first_row);
          if (o >= end) continue;
          const auto sign = *reinterpret_cast<const Piece<int8_t, V>*>(row + o);
          const auto from = *reinterpret_cast<const Pack<S, V>*>(y + o);
#pragma unroll
          for (int u = 0; u < V; ++u) v[e * V + u] += with_sign(widen(from.get(u)), sign.v[u]);
        } else {
#pragma unroll
          for (int u = 0; u < V; ++u) {
            const int o = at.row_of(e, u, first_row);
            if (o < end) v[e * V + u] += with_sign(widen(y[o]), row[o]);
          }
        }
      }
    }
    hadamard<V>(v);
    at.store(v, rows);
  }
}

// From u times lam and col in rows.
template <class S, bool Scratch, class C = ComputeOf<S>>
__device__ __forceinline__ void write_w(const HadamardDown& p, const Rows<C, Scratch>& rows,
                                        int log, int64_t t0, int64_t tokens, const Share& share) {
  using Index = typename Rows<C, Scratch>::Index;
  const C scale = static_cast<C>(p.scale);
  const int n = static_cast<int>(p.sizes.n);
  const Index columns = Index(tokens) * n;
  const int64_t stride = p.T * p.sizes.n;
  const int r = static_cast<int>(p.sizes.r), first_class = static_cast<int>(p.sizes.first_class()),
            end_class = first_class + static_cast<int>(p.sizes.classes());
  S* w = static_cast<S*>(p.w) + t0 * p.sizes.n - first_class * stride;
  with_ranks<C>(p.sizes.r, [&](auto m) {
    constexpr int M = decltype(m)::value;
    const int first_block = first_class / M, blocks = (end_class + M - 1) / M;
    const Index items = columns * (blocks - first_block);
    for (Index item = Index(share.first); item < items; item += Index(share.step)) {
      const int of_block = static_cast<int>(item / columns), block = first_block + of_block;
      const Index q = item - of_block * columns, t = q / n;
      C v[M];
      mix(v, block, 0, r, walk_row(rows.row(t, log), static_cast<int>(q - t * n), n));
      Walk<S> to{w + q, stride};
      to.skip(block * M);
#pragma unroll
      for (int e = 0; e < M; ++e) {
        const int k = block * M + e;
        S* at = to.next();
        if (k >= first_class && k < end_class) *at = narrow<S>(scale * v[e]);
      }
    }
  });
}

// sum[e] += a[e] b[e], for kValues numbers.
template <class C>
__device__ __forceinline__ void add_products(const C (&a)[kValues<C>], const C* b, C* sum) {
  constexpr int V = kPerAccess<C>;
#pragma unroll
  for (int e = 0; e < kValues<C>; e += V) {
    const auto factors = *reinterpret_cast<const Piece<C, V>*>(b + e);
    auto& sums = *reinterpret_cast<Piece<C, V>*>(sum + e);
    Piece<C, V> x = sums;
#pragma unroll
    for (int u = 0; u < V; ++u) x.v[u] += a[e + u] * factors.v[u];
    sums = x;
  }
}

template <class S, bool Aligned, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kThreads, Aligned ? 2 : 1)
    hadamard_down_kernel(HadamardDown p, Diagonal<C> diagonal, int log, int64_t of_block) {
  const int64_t N = int64_t{1} << log, K = p.sizes.K();
  const int64_t size = Rows<C, false>::bytes(of_block << log) / sizeof(C);
  const Rows<C, false> rows{reinterpret_cast<C*>(shared_memory())}, mixed{rows.numbers + size},
      sums{mixed.numbers + size};
  const int64_t begin = p.z ? blockIdx.x * p.T / p.slots : blockIdx.x * of_block;
  const int64_t end = p.z ? (blockIdx.x + 1) * p.T / p.slots : min(begin + of_block, p.T);
  const Share share = share_of_block();
  if (p.z) {
    for (int64_t e = share.first; e < size; e += share.step) sums.numbers[e] = C(0);
    __syncthreads();
  }
  for (int64_t t0 = begin; t0 < end; t0 += of_block) {
    const int64_t tokens = min(of_block, end - t0);
    read_y<S, Aligned>(p, rows, log, t0, tokens, share);
    if (p.z) write_mixed<S>(p.sizes, p.z, p.T, mixed, log, t0, tokens, share);
    __syncthreads();
    middle_passes(rows, log, kEdgeBits<S>, tokens << log);
    low_pass(rows, tokens << log, share, [&](auto& v, int x) {
      hadamard<1>(v);
      if (p.z) add_products(v, mixed.at(x), sums.at(x));
      diagonal.apply(v, x & (N - 1));
    });
    __syncthreads();
    write_w<S>(p, rows, log, t0, tokens, share);
    __syncthreads();
  }
  if (!p.z) return;
  C* out = static_cast<C*>(p.sums) + blockIdx.x * K;
  for (int c = static_cast<int>(share.first); c < K; c += static_cast<int>(share.step)) {
    C sum = *sums.at(c);
    for (int t = 1; t < of_block; ++t) sum += *sums.at((t << log) + c);
    out[c] = sum;
  }
}

template <class S, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_down_load_kernel(HadamardDown p, C* scratch, int log, int64_t t0, int64_t tokens) {
  read_y<S, false>(p, Rows<C, true>{scratch}, log, t0, tokens, share_of_grid());
}
template <class S, class C = ComputeOf<S>>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_down_store_kernel(HadamardDown p, C* scratch, int log, int64_t t0, int64_t tokens) {
  write_w<S>(p, Rows<C, true>{scratch}, log, t0, tokens, share_of_grid());
}
// Adds the products of tokens t0 to t0 + tokens - 1 to their slots; blockIdx.y is the slot.
template <class C>
__global__ void __launch_bounds__(kScratchThreads)
    hadamard_down_sums_kernel(HadamardDown p, const C* products, int log, int64_t t0,
                              int64_t tokens) {
  const int64_t slot = blockIdx.y, begin = slot * p.T / p.slots, end = (slot + 1) * p.T / p.slots;
  C* sums = static_cast<C*>(p.sums) + slot * p.sizes.K();
  for (int64_t c = share_of_grid().first; c < p.sizes.K(); c += share_of_grid().step) {
    C sum = t0 == 0 ? C(0) : sums[c];
    for (int64_t t = max(begin, t0); t < min(end, t0 + tokens); ++t)
      sum += products[((t - t0) << log) + c];
    sums[c] = sum;
  }
}

}  // namespace

// One launch. If N numbers (with z: 3 N) do not fit shared memory: for each chunk of tokens 3 (with
// z: 5) launches, and one for each middle pass (hadamard_scratch.cu).
void hadamard_down(const HadamardDown& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = ComputeOf<S>;
    const Plan<S> plan(p.sizes, p.T / (p.z ? p.slots : device.multiprocessors), device,
                       p.z ? 3 : 1);
    if (plan.fits(device)) {
      constexpr int V = kPerAccess<S>;
      const bool aligned = aligned_rows(p.sizes.D, V, p.y) && p.sizes.first_row % V == 0 &&
                           reinterpret_cast<uintptr_t>(p.row) % V == 0;
      launch(device, "hadamard_down",
             aligned ? hadamard_down_kernel<S, true> : hadamard_down_kernel<S, false>,
             p.z ? p.slots : ceil_div(p.T, plan.rows), plan.threads, plan.shared, p, Diagonal<C>(p),
             plan.log, plan.rows);
      return;
    }
    InScratch<C> all(plan.log, p.T, device);
    C* mixed = p.z ? scratch<C>(device, all.chunk << plan.log) : nullptr;
    each_chunk(p.T, all.chunk, [&](int64_t t0, int64_t tokens) {
      all.start("hadamard_down_load", hadamard_down_load_kernel<S>, all.of_numbers(tokens), p,
                all.numbers, plan.log, t0, tokens);
      all.transform(kEdgeBits<S>, tokens);
      if (p.z) all.mix(p.sizes, p.z, p.dtype, p.T, mixed, t0, tokens);
      all.low(false, Diagonal<C>(p), mixed, tokens);
      all.start("hadamard_down_store", hadamard_down_store_kernel<S>,
                all.blocks(tokens * p.sizes.n), p, all.numbers, plan.log, t0, tokens);
      if (p.z)
        all.start("hadamard_down_sums", hadamard_down_sums_kernel<C>,
                  {all.blocks(p.sizes.K()), p.slots}, p, mixed, plan.log, t0, tokens);
    });
  });
}

}  // namespace randlora::cuda
