// What the products of the A side share (a_side.h): tables, made once per basis, or per call if the
// basis keeps none; and values, made once per call.
//
//   find_entries   thread (j, k): two binary searches in row j of A tell whether A[j, k] is an
//                  entry p, and how many entries of j lie before column k
//   form_values    a block takes 32 entries p, 64 copies i. It reads gam[i, k_p] (k_p: the column
//                  of p) along p, transposes the tile in shared memory and writes along i
//
// Floor: find_entries writes 4 (r d + nnz(A)) bytes; form_values reads gamma at n nnz(A) positions
// and writes as many values. Latency dominates both.
#include "a_side.h"

namespace randlora::cuda {
namespace {

__global__ void find_entries(Lists a, int64_t r, int64_t d, int32_t* entry, int32_t* place) {
  const int64_t x = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (x >= r * d) return;
  const int64_t j = x / d, k = x % d;
  const int64_t plus = a.plus(j), minus = a.minus(j), end = a.end(j);
  const int64_t first = support_room(plus, j), size = end - plus;
  const int64_t at_plus = lower_bound(a.index, plus, minus, k);
  const int64_t at_minus = lower_bound(a.index, minus, end, k);
  const bool is_plus = at_plus < minus && a.index[at_plus] == k;
  const bool is_minus = at_minus < end && a.index[at_minus] == k;
  const int64_t p = at_plus - plus + at_minus - minus;
  if (is_plus || is_minus) entry[first + p] = static_cast<int32_t>(2 * k + is_minus);
  place[x] = static_cast<int32_t>(is_plus || is_minus ? 2 * p + is_minus : -1 - p);
  for (int64_t q = size + k; q < ceil_div(size, kSupportGroup) * kSupportGroup; q += d)
    entry[first + q] = -1;
}

constexpr int kCopies = 64;  // per block of form_values

// lam is null for values without lambda.
template <class S, class C>
__global__ void form_values(Support s, const C* __restrict__ lam, const C* __restrict__ gam,
                            C scale, S* __restrict__ values) {
  S* tile = reinterpret_cast<S*>(shared_memory());  // (kSupportGroup, kCopies + 2)
  constexpr int kStride = kCopies + 2;
  const int64_t chunks = ceil_div(s.copies, kCopies);
  const int64_t group = blockIdx.x / chunks, i0 = blockIdx.x % chunks * kCopies;
  const int64_t j = line_of_tile(s.offset, s.r, group, kSupportGroup);
  if (group * kSupportGroup - s.first(j) >= s.size(j)) return;
  const int64_t e0 = group * kSupportGroup;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const int32_t code = s.entry[e0 + lane];
#pragma unroll 4
  for (int b = warp; b < kCopies; b += warps) {
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
  for (int x = threadIdx.x; x < kSupportGroup * kCopies; x += blockDim.x) {
    const int p = x / kCopies, b = x % kCopies;
    if (i0 + b < s.copies) values[(e0 + p) * s.copies + i0 + b] = tile[p * kStride + b];
  }
}

}  // namespace

void support_tables(const Lists& a, int64_t r, int64_t d, int32_t* tables, Device& device) {
  const int threads = min(256, device.max_threads);
  launch(device, "find_entries", find_entries, ceil_div(r * d, threads), threads, 0, a, r, d,
         tables, tables + support_room(a.count, r));
}

// A part of z takes at most a quarter of chunk_bytes.
ASideCall::ASideCall(const IndependentLinear& p, int64_t T, Device& device)
    : p_(p), device_(device), part_(tokens_within(device.chunk_bytes / 4, T, p.basis.d, p.dtype)) {}

const Support& ASideCall::support() {
  if (support_.entry) return support_;
  const TernaryBases& b = p_.basis;
  const int32_t* tables = b.a_tables;
  if (!tables) {
    auto* made = scratch<int32_t>(device_, support_numbers(b.a.count, b.r, b.d));
    support_tables(b.a, b.r, b.d, made, device_);
    tables = made;
  }
  support_.offset = b.a.offset;
  support_.r = b.r;
  support_.n = b.n;
  support_.d = b.d;
  support_.copies = ceil_div(b.n, 8) * 8;
  support_.count = b.a.count;
  support_.entry = tables;
  support_.at = tables + support_room(b.a.count, b.r);
  return support_;
}

const void* ASideCall::values(bool with_lambda) {
  void*& made = values_[with_lambda];
  if (made) return made;
  const Support& s = support();
  with_dtype(p_.dtype, [&](auto storage) {
    using S = decltype(storage);
    using C = ComputeOf<S>;
    made = scratch<S>(device_, s.room() * s.copies);
    launch(device_, "form_values", form_values<S, C>,
           most_tiles(s.count, s.r, kSupportGroup) * ceil_div(s.copies, kCopies),
           min(256, device_.max_threads), kSupportGroup * (kCopies + 2) * int64_t{sizeof(S)}, s,
           with_lambda ? p_.lam : nullptr, p_.gam, p_.scale, made);
  });
  return made;
}

void ASideCall::set_operand(const void* z, int64_t T) { z_ = z, T_ = T, filled_ = -1; }

const Panels& ASideCall::panels(int64_t t) {
  if (!panels_.data)
    panels_ = make_panels(part_, p_.basis.d, part_ > 32 ? 64 : 32, p_.dtype, device_);
  if (filled_ != t)
    fill_panels(moved(z_, t * p_.basis.d, p_.dtype), min(part_, T_ - t), panels_, p_.dtype,
                device_);
  filled_ = t;
  return panels_;
}

}  // namespace randlora::cuda
