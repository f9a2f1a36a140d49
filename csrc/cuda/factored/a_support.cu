// What the products of the A side share (a_side.h): tables, made once per basis, or per call if the
// basis keeps none; and values, made once per call.
//
//   find_entries   thread (j, k): two binary searches in row j of A tell whether A[j, k] is an
//                  entry p, and how many entries of j lie before column k
//   form_values    a block takes 32 entries p and 64 bases i. It reads gam[i, k_p] (k_p: the column
//                  of p) along p, transposes the tile in shared memory and writes along i
//
// Floor: find_entries writes 4 (r d + nnz(A)) bytes; form_values reads gamma at n nnz(A) positions
// and writes as many values. Latency dominates both.
#include "a_side.h"

namespace randlora {
namespace cuda {
namespace {

// How many of the ascending index[begin, end) are below k.
template <class Index>
__device__ __forceinline__ int64_t lower_bound(const Index* index, int64_t begin, int64_t end,
                                               int64_t k) {
  const int64_t start = begin;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (index[middle] < k)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin - start;
}

template <class Index>
__global__ void find_entries(Lists<Index> a, int64_t r, int64_t d, int32_t* entry, int32_t* place) {
  const int64_t x = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (x >= r * d) return;
  const int64_t j = x / d, k = x % d;
  const int64_t plus = a.plus(j), minus = a.minus(j), end = a.end(j);
  const int64_t first = (plus / kGroup + j) * kGroup, size = end - plus;  // as in Support
  const int64_t in_plus = lower_bound(a.index, plus, minus, k);
  const int64_t in_minus = lower_bound(a.index, minus, end, k);
  const bool is_plus = plus + in_plus < minus && a.index[plus + in_plus] == k;
  const bool is_minus = minus + in_minus < end && a.index[minus + in_minus] == k;
  const int64_t p = in_plus + in_minus;
  if (is_plus || is_minus) entry[first + p] = static_cast<int32_t>(2 * k + is_minus);
  place[x] = static_cast<int32_t>(is_plus || is_minus ? 2 * p + is_minus : -1 - p);
  for (int64_t q = size + k; q < ceil_div(size, kGroup) * kGroup; q += d) entry[first + q] = -1;
}

constexpr int kBases = 64;  // per block of form_values

// lam is null for values without lambda.
template <class S, class C>
__global__ void form_values(Support s, const C* __restrict__ lam, const C* __restrict__ gam,
                            C scale, S* __restrict__ values) {
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kGroup, kBases + 2)
  constexpr int kStride = kBases + 2;
  const int64_t chunks = ceil_div(s.bases, kBases);
  const int64_t group = blockIdx.x / chunks, i0 = blockIdx.x % chunks * kBases;
  const int64_t j = s.rank_of_tile(group, kGroup);
  if (group * kGroup - s.first(j) >= s.size(j)) return;
  const int64_t e0 = group * kGroup;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const int32_t code = s.entry[e0 + lane];
#pragma unroll 4
  for (int b = warp; b < kBases; b += warps) {
    const int64_t i = i0 + b;
    C value = 0;
    if (code >= 0 && i < s.n) {
      value = gam[i * s.d + code / 2];
      if (lam) value *= lam[j * s.n + i] * scale;
      if (code & 1) value = -value;
    }
    tile[lane * kStride + b] = narrow<S>(value);
  }
  __syncthreads();
  for (int x = threadIdx.x; x < kGroup * kBases; x += blockDim.x) {
    const int p = x / kBases, b = x % kBases;
    if (i0 + b < s.bases) values[(e0 + p) * s.bases + i0 + b] = tile[p * kStride + b];
  }
}

}  // namespace

void support_tables(const AnyLists& a, bool wide, int64_t r, int64_t d, int32_t* tables,
                    Device& device) {
  const int threads = min(256, device.max_threads);
  const dim3 grid(static_cast<unsigned>(ceil_div(r * d, threads)));
  int32_t* place = tables + support_room(a.count, r);
  if (wide)
    launch(device, "find_entries", find_entries<uint32_t>, grid, threads, 0, a.as<uint32_t>(), r, d,
           tables, place);
  else
    launch(device, "find_entries", find_entries<uint16_t>, grid, threads, 0, a.as<uint16_t>(), r, d,
           tables, place);
}

// A part of z takes at most a quarter of chunk_bytes.
ASideCall::ASideCall(const ASide& p, double scale, Device& device)
    : p_(p), scale_(scale), device_(device) {
  const int64_t tokens = device.chunk_bytes / 4 / (p.basis.d * bytes_of(p.dtype));
  part_ = min(p.T, max(tokens / 128, int64_t{1}) * 128);
}

const Support& ASideCall::support() {
  Support& s = support_;
  if (s.entry) return s;
  const Basis& b = p_.basis;
  const int32_t* tables = b.a_tables;
  if (!tables) {
    auto* made = scratch<int32_t>(device_, support_numbers(b.a.count, b.r, b.d));
    support_tables(b.a, b.wide, b.r, b.d, made, device_);
    tables = made;
  }
  s = {b.a.offset,           b.r,       b.n,    b.d,
       ceil_div(b.n, 8) * 8, b.a.count, tables, tables + support_room(b.a.count, b.r)};
  return s;
}

const void* ASideCall::values(bool with_lambda) {
  void*& made = values_[with_lambda];
  if (made) return made;
  const Support& s = support();
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = typename ComputeOf<S>::type;
    made = scratch<S>(device_, s.room() * s.bases);
    launch(device_, "form_values", form_values<S, C>,
           dim3(static_cast<unsigned>(s.tiles(kGroup) * ceil_div(s.bases, kBases))),
           min(256, device_.max_threads), kGroup * (kBases + 2) * int64_t{sizeof(S)}, s,
           with_lambda ? p_.lam : nullptr, p_.gam, scale_, made);
  });
  return made;
}

void ASideCall::set_operand(const void* z, int64_t T) { z_ = z, T_ = T, filled_ = -1; }

const Panels& ASideCall::panels(int64_t t) {
  if (!panels_.data)
    panels_ = make_panels(part_, p_.basis.d, part_ > 32 ? 64 : 32, p_.dtype, device_);
  if (filled_ != t)
    fill_panels(static_cast<const char*>(z_) + t * p_.basis.d * bytes_of(p_.dtype),
                min(part_, T_ - t), panels_, p_.dtype, device_);
  filled_ = t;
  return panels_;
}

}  // namespace cuda
}  // namespace randlora
