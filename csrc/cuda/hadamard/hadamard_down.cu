// u[t, c] = sum over o of row[o] H[o, c] y[t, o], with c = j * n + i, and from it
//
//   w[m, t, i] = scale * sum over j of H[j, m] col[c] lam[c] u[t, c]
//   sums[q, c] = sum over the tokens t of slot q of u[t, c] * sum over m of H[j, m] z[m, t, i]
//
// hadamard_up backwards. Rows o and o + N of H are equal, so the elements of y with equal o modulo
// N are added first, and the transform has N numbers however large D is.
//
// Without sums a thread block takes one token, or several if rows are short. With sums it takes a
// slot and walks its tokens; a thread always has the same elements of sums, so nobody else touches
// them and their order is that of the tokens.
//
// Floor: y (and z) read and w written once.
#include "../device/launch.h"
#include "../kernels.h"
#include "mix.h"

namespace randlora {
namespace cuda {
namespace {

template <class S, bool Aligned, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void read_y(const HadamardDown& p, const Rows<C, Scratch>& rows, int log,
                                       int64_t t0, int64_t tokens, const Share& share) {
  using At = Edge<S, Aligned>;
  constexpr int V = At::V;
  const int64_t N = int64_t{1} << log, items = tokens << log >> kBits<C>;
  for (int64_t g = share.first; g < items; g += share.step) {
    const At at(g, log);
    const S* y = static_cast<const S*>(p.y) + (t0 + at.row) * p.sizes.D;
    C v[kValues<C>];
#pragma unroll
    for (int e = 0; e < kValues<C>; ++e) v[e] = C(0);
#pragma unroll
    for (int e = 0; e < At::kCount; ++e) {
      if constexpr (Aligned) {
        for (int64_t o = (at.first + at.place(e) - p.sizes.first_row) & (N - 1); o < p.sizes.D;
             o += N) {
          const auto sign = *reinterpret_cast<const Piece<int8_t, V>*>(p.row + o);
          const auto from = *reinterpret_cast<const Pack<S, V>*>(y + o);
#pragma unroll
          for (int u = 0; u < V; ++u) v[e * V + u] += with_sign(widen(from.get(u)), sign.v[u]);
        }
      } else {
#pragma unroll
        for (int u = 0; u < V; ++u)
          for (int64_t o = (at.column(u) + at.place(e) - p.sizes.first_row) & (N - 1);
               o < p.sizes.D; o += N)
            v[e * V + u] += with_sign(widen(y[o]), p.row[o]);
      }
    }
    hadamard<V>(v);
    at.store(v, rows);
  }
}

template <class S, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void write_w(const HadamardDown& p, const Rows<C, Scratch>& rows,
                                        int log, int64_t t0, int64_t tokens, const Share& share) {
  using Index = typename Rows<C, Scratch>::Index;
  const C *lam = static_cast<const C*>(p.lam), scale = static_cast<C>(p.scale);
  const Index n = Index(p.sizes.n), columns = Index(tokens) * n;
  const int64_t stride = p.T * p.sizes.n, first_class = p.sizes.first_class(),
                end_class = first_class + p.sizes.classes();
  S* w = static_cast<S*>(p.w) + t0 * p.sizes.n - first_class * stride;
  with_block_of_ranks<C>(p.sizes.r, [&](auto m) {
    constexpr int M = decltype(m)::value;
    const Index first_block = Index(first_class / M), blocks = Index(ceil_div(end_class, M));
    const Index items = columns * (blocks - first_block);
    for (Index item = Index(share.first); item < items; item += Index(share.step)) {
      const Index of_block = item / columns, block = first_block + of_block;
      const Index q = item - of_block * columns, t = q / n, i = q - t * n;
      C v[M];
      mix(v, block, 0, p.sizes.r, [&](int64_t j) {
        const Index c = Index(j) * n + i;
        return with_sign(lam[c] * *rows.at((t << log) + c), p.col[c]);
      });
#pragma unroll
      for (int e = 0; e < M; ++e) {
        const int64_t k = int64_t{block} * M + e;
        if (k >= first_class && k < end_class) w[k * stride + q] = narrow<S>(scale * v[e]);
      }
    }
  });
}

// Adds what these tokens give to sums (K).
template <class S, bool Scratch, class C = typename ComputeOf<S>::type>
__device__ __forceinline__ void add_sums(const HadamardDown& p, const Rows<C, Scratch>& rows,
                                         int log, int64_t t0, int64_t tokens, C* sums,
                                         const Share& share) {
  using Index = typename Rows<C, Scratch>::Index;
  const Mixed<S> z(p.sizes, p.z, p.T, t0);
  const Index n = Index(p.sizes.n);
  with_block_of_ranks<C>(p.sizes.r, [&](auto m) {
    constexpr int M = decltype(m)::value;
    const Index items = n * Index(ceil_div(p.sizes.r, M));
    for (Index item = Index(share.first); item < items; item += Index(share.step)) {
      const Index block = item / n, i = item - block * n;
#pragma unroll 1
      for (Index t = 0; t < Index(tokens); ++t) {
        C v[M];
        z.get(v, block, t * n + i);
#pragma unroll
        for (int e = 0; e < M; ++e) {
          const Index c = (block * M + e) * n + i;
          if (block * M + e < Index(p.sizes.r)) sums[c] += v[e] * *rows.at((t << log) + c);
        }
      }
    }
  });
}

template <class S, bool Aligned>
__global__ void hadamard_down_kernel(HadamardDown p, int log, int64_t of_block) {
  using C = typename ComputeOf<S>::type;
  const Rows<C, false> rows{reinterpret_cast<C*>(shared_memory())};
  const int64_t begin = p.z ? blockIdx.x * p.T / p.slots : blockIdx.x * of_block;
  const int64_t end = p.z ? (blockIdx.x + 1) * p.T / p.slots : min(begin + of_block, p.T);
  C* sums = static_cast<C*>(p.sums) + blockIdx.x * p.sizes.K();
  if (p.z)
    for (int64_t c = threadIdx.x; c < p.sizes.K(); c += blockDim.x) sums[c] = C(0);
  for (int64_t t0 = begin; t0 < end; t0 += of_block) {
    const int64_t tokens = min(of_block, end - t0);
    read_y<S, Aligned>(p, rows, log, t0, tokens, share_of_block());
    transform_in_block(rows, log, kEdgeBits<S>, of_block << log);
    write_w<S>(p, rows, log, t0, tokens, share_of_block());
    if (p.z) add_sums<S>(p, rows, log, t0, tokens, sums, share_of_block());
    __syncthreads();
  }
}

template <class S>
__global__ void hadamard_down_load_kernel(HadamardDown p, typename ComputeOf<S>::type* scratch,
                                          int log, int64_t t0, int64_t tokens) {
  read_y<S, false>(p, Rows<typename ComputeOf<S>::type, true>{scratch}, log, t0, tokens,
                   share_of_grid());
}
template <class S>
__global__ void hadamard_down_mix_kernel(HadamardDown p, typename ComputeOf<S>::type* scratch,
                                         int log, int64_t t0, int64_t tokens) {
  write_w<S>(p, Rows<typename ComputeOf<S>::type, true>{scratch}, log, t0, tokens, share_of_grid());
}
template <class C>
__global__ void hadamard_down_clear_kernel(C* sums, int64_t count) {
  for (int64_t e = share_of_grid().first; e < count; e += share_of_grid().step) sums[e] = C(0);
}
// blockIdx.y is the slot. The scratch memory has tokens t0 to t0 + tokens - 1.
template <class S>
__global__ void hadamard_down_sums_kernel(HadamardDown p, typename ComputeOf<S>::type* scratch,
                                          int log, int64_t t0, int64_t tokens) {
  using C = typename ComputeOf<S>::type;
  const int64_t slot = blockIdx.y, begin = slot * p.T / p.slots, end = (slot + 1) * p.T / p.slots;
  const int64_t from = max(begin, t0), to = min(end, t0 + tokens);
  if (from < to)
    add_sums<S>(p, Rows<C, true>{scratch + ((from - t0) << log)}, log, from, to - from,
                static_cast<C*>(p.sums) + slot * p.sizes.K(), share_of_grid());
}

template <class S>
void down(const HadamardDown& p, Device& device) {
  using C = typename ComputeOf<S>::type;
  const Plan<S> plan(p.sizes, p.T, device);
  if (plan.fits(device)) {
    constexpr int V = kPerAccess<S>;
    const bool aligned = aligned_rows(p.sizes.D, V, p.y) && p.sizes.first_row % V == 0 &&
                         reinterpret_cast<uintptr_t>(p.row) % V == 0;
    launch(device, "hadamard_down",
           aligned ? hadamard_down_kernel<S, true> : hadamard_down_kernel<S, false>,
           static_cast<unsigned>(p.z ? p.slots : ceil_div(p.T, plan.rows)), plan.threads,
           plan.shared, p, plan.log, plan.rows);
    return;
  }
  InScratch<C> all(plan.log, p.T, device);
  if (p.z)
    launch(device, "hadamard_down_clear", hadamard_down_clear_kernel<C>,
           all.blocks(p.slots * p.sizes.K()), all.threads, 0, static_cast<C*>(p.sums),
           p.slots * p.sizes.K());
  all.each([&](int64_t t0, int64_t tokens) {
    launch(device, "hadamard_down_load", hadamard_down_load_kernel<S>,
           all.blocks(tokens << plan.log >> kBits<C>), all.threads, 0, p, all.numbers, plan.log, t0,
           tokens);
    all.transform(kEdgeBits<S>, tokens);
    launch(device, "hadamard_down_mix", hadamard_down_mix_kernel<S>, all.blocks(tokens * p.sizes.n),
           all.threads, 0, p, all.numbers, plan.log, t0, tokens);
    if (p.z)
      launch(device, "hadamard_down_sums", hadamard_down_sums_kernel<S>,
             dim3(all.blocks(p.sizes.n), static_cast<unsigned>(p.slots)), all.threads, 0, p,
             all.numbers, plan.log, t0, tokens);
  });
}

}  // namespace

// One launch, if rows of N numbers fit shared memory; else several for each chunk of tokens.
void hadamard_down(const HadamardDown& p, Device& device) {
  with_dtype(p.dtype, [&](auto s) { down<decltype(s)>(p, device); });
}

}  // namespace cuda
}  // namespace randlora
