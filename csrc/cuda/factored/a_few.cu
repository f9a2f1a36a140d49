// Up and down of the A side (a_side.h) for a handful of tokens, as in decoding. Nothing is
// prepared, and sums are in the compute type.
//
//   up     a block takes a base i and up to four tokens. z'[k] = gam[i, k] z[t, k] goes to shared
//          memory; then V[t, (j, i)] is a signed sum of z' over row j of A: a warp per row, lanes
//          over its entries
//   down   a block takes 32 columns k, one per lane, and some tokens. It finds the entries of these
//          columns by binary search. lam U of a token goes to shared memory; then
//          out[t, k] = sum_i gam[i, k] sum_j A[j, k] (lam U)[j, i], warps over i
//
// Floor: gamma (n d elements) read once; T n nnz(A) additions. Latency dominates.
#include "../device/ptx.h"
#include "a_side.h"

namespace randlora::cuda {
namespace {

// ---- up -----------------------------------------------------------------------------------------

template <class S, class Index, int TT>
__global__ void up_few_kernel(Lists<Index> a, int64_t r, int64_t n, int64_t d, int64_t slices,
                              const ComputeOf<S>* __restrict__ lam,
                              const ComputeOf<S>* __restrict__ gam, ComputeOf<S> scale,
                              const S* __restrict__ z, int64_t T, S* __restrict__ V) {
  using C = ComputeOf<S>;
  using Row = Piece<C, TT>;                            // of z': TT tokens, read at once
  Row* row = reinterpret_cast<Row*>(shared_memory());  // (d)
  int64_t block = blockIdx.x;
  const int64_t slice = block % slices;
  block /= slices;
  const int64_t i = block % n, t0 = block / n * TT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  // Unrolled over several columns, so that their loads overlap. Tokens past T repeat the last one
  // and are not stored.
  const auto multiply = [&](auto columns, int64_t first) {
    C g[columns.value];
    S value[columns.value][TT];
#pragma unroll
    for (int u = 0; u < columns.value; ++u) {
      const int64_t k = first + u * blockDim.x;
      g[u] = gam[i * d + k];
#pragma unroll
      for (int t = 0; t < TT; ++t) value[u][t] = z[min(t0 + t, T - 1) * d + k];
    }
#pragma unroll
    for (int u = 0; u < columns.value; ++u) {
      Row product;
#pragma unroll
      for (int t = 0; t < TT; ++t) product.v[t] = g[u] * widen(value[u][t]);
      row[first + u * blockDim.x] = product;
    }
  };
  constexpr int kAtOnce = TT == 1 ? 8 : 4;
  int64_t k = threadIdx.x;
  for (; k + (kAtOnce - 1) * blockDim.x < d; k += kAtOnce * blockDim.x)
    multiply(std::integral_constant<int, kAtOnce>{}, k);
  for (; k < d; k += blockDim.x) multiply(std::integral_constant<int, 1>{}, k);
  __syncthreads();
  for (int64_t j = slice * warps + warp; j < r; j += slices * warps) {
    const int64_t minus = a.minus(j), end = a.end(j);
    C sum[TT] = {};
#pragma unroll 4
    for (int64_t p = a.plus(j) + lane; p < end; p += 32) {
      const Row product = row[a.index[p]];
      const C sign = p < minus ? C(1) : C(-1);
#pragma unroll
      for (int t = 0; t < TT; ++t) sum[t] += sign * product.v[t];
    }
    const C total = warp_sums<TT>(sum);
    const int64_t t = t0 + lane / (32 / TT);
    if (lane % (32 / TT) == 0 && t < T)
      V[t * r * n + j * n + i] = narrow<S>(total * lam[j * n + i] * scale);
  }
}

// ---- down ---------------------------------------------------------------------------------------

constexpr int kBases = 4;  // bases whose sums a lane keeps at once

template <class S, class Index>
__global__ void down_few_kernel(Lists<Index> a, int64_t r, int64_t n, int64_t d, int64_t slice,
                                const ComputeOf<S>* __restrict__ lam,
                                const ComputeOf<S>* __restrict__ gam, ComputeOf<S> scale,
                                const S* __restrict__ U, int64_t T, S* __restrict__ out,
                                bool accumulate) {
  using C = ComputeOf<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int stride = static_cast<int>(n | 1);    // odd: fewer bank conflicts between lanes
  C* u = reinterpret_cast<C*>(shared_memory());  // (r, stride): scale lam U
  C* parts = u + r * stride;                     // (warps, 32)
  int32_t* code = reinterpret_cast<int32_t*>(parts + blockDim.x);  // (r, 32)
  int32_t* low = code + r * 32;                                    // (r, 2)
  const int64_t columns = ceil_div(d, 32);
  const int64_t k0 = blockIdx.x % columns * 32, k = k0 + lane;
  const int64_t t0 = blockIdx.x / columns * slice, t1 = min(T, t0 + slice);

  // code[., lane] = the entries of column k: 2 j, plus 1 if A is -1, ascending by j. First it has
  // holes: a thread searches a run of A's lists for column k0, and a warp reads on from there.
  const auto run = [&](int64_t q) { return a.offset + q; };  // [run(q)[0], run(q)[1])
  for (int64_t q = threadIdx.x; q < 2 * r; q += blockDim.x) {
    const int64_t begin = run(q)[0];
    low[q] = static_cast<int32_t>(lower_bound(a.index, begin, run(q)[1], k0) - begin);
  }
  for (int64_t x = threadIdx.x; x < r * 32; x += blockDim.x) code[x] = -1;
  __syncthreads();
#pragma unroll 4
  for (int64_t q = warp; q < 2 * r; q += warps) {
    const int64_t p = run(q)[0] + low[q] + lane;
    if (p < run(q)[1] && a.index[p] < k0 + 32)
      code[q / 2 * 32 + (a.index[p] - k0)] = static_cast<int32_t>(q);
  }
  __syncthreads();
  if (warp == 0) {
    int entries = 0;
    for (int64_t j = 0; j < r; ++j) {
      const int32_t c = code[j * 32 + lane];
      if (c >= 0) code[entries++ * 32 + lane] = c;
    }
    parts[lane] = static_cast<C>(entries);
  }
  __syncthreads();
  const int entries = static_cast<int>(parts[lane]);

  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t j = warp; j < r; j += warps) {  // a loop over c = j n + i would divide by n
      const S* from = U + (t * r + j) * n;
      for (int first = lane; first < n; first += 4 * 32) {
        C value[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int64_t i = min(int64_t{first} + 32 * v, n - 1);
          value[v] = widen(from[i]) * (lam[j * n + i] * scale);
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) pin(value[v]);
#pragma unroll
        for (int v = 0; v < 4; ++v)
          if (first + 32 * v < n) u[j * stride + first + 32 * v] = value[v];
      }
    }
    __syncthreads();
    C sum = 0;
    if (entries > 0)
      for (int64_t i = warp * kBases; i < n; i += warps * kBases) {
        C of_base[kBases] = {};
        for (int e = 0; e < entries; ++e) {
          const int32_t c = code[e * 32 + lane];
          const C sign = c & 1 ? C(-1) : C(1);
#pragma unroll
          for (int b = 0; b < kBases; ++b)
            if (i + b < n) of_base[b] += sign * u[c / 2 * stride + i + b];
        }
#pragma unroll
        for (int b = 0; b < kBases; ++b)
          if (i + b < n) sum += gam[(i + b) * d + k] * of_base[b];
      }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && k < d) {
      for (int w = 1; w < warps; ++w) sum += parts[w * 32 + lane];
      S* to = out + t * d + k;
      *to = narrow<S>(accumulate ? widen(*to) + sum : sum);
    }
  }
}

}  // namespace

// Up to 16 tokens, if T nnz(A) <= r d. Above that, tensor cores are faster.
bool ASideCall::few(int64_t T) const {
  const Basis& b = p_.basis;
  return T <= 16 && T * b.a.count <= b.r * b.d;
}

bool ASideCall::up_few(void* V) {
  const Basis& b = p_.basis;
  const int64_t row = b.d * (p_.dtype == DType::f64 ? 8 : 4);
  if (row > device_.shared_bytes) return false;
  const int TT = T_ > 1 && 4 * row <= device_.shared_bytes ? 4 : 1;
  const int threads = min(256, device_.max_threads);
  const int64_t blocks = b.n * ceil_div(T_, TT);
  const int64_t slices =
      max(int64_t{1}, min(2 * device_.multiprocessors / blocks, ceil_div(b.r, threads / 32)));
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    b.a.typed([&](auto lists) {
      using Index = typename decltype(lists)::Index;
      launch(device_, "a_up_few", TT == 4 ? up_few_kernel<S, Index, 4> : up_few_kernel<S, Index, 1>,
             blocks * slices, threads, TT * row, lists, b.r, b.n, b.d, slices, p_.lam, p_.gam,
             scale_, z_, T_, V);
    });
  });
  return true;
}

bool ASideCall::down_few(const void* U, int64_t T, void* out, bool accumulate) {
  const Basis& b = p_.basis;
  const int threads = min(256, device_.max_threads);
  const int64_t shared =
      (b.r * (b.n | 1) + threads) * (p_.dtype == DType::f64 ? 8 : 4) + b.r * 34 * 4;
  if (shared > device_.shared_bytes) return false;
  const int64_t columns = ceil_div(b.d, 32);
  const int64_t slice = ceil_div(T, max(int64_t{1}, min(T, 4 * device_.multiprocessors / columns)));
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    b.a.typed([&](auto lists) {
      launch(device_, "a_down_few", down_few_kernel<S, typename decltype(lists)::Index>,
             columns * ceil_div(T, slice), threads, shared, lists, b.r, b.n, b.d, slice, p_.lam,
             p_.gam, scale_, U, T, out, accumulate);
    });
  });
  return true;
}

}  // namespace randlora::cuda
