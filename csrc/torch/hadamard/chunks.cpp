#include "chunks.h"

#include <algorithm>

namespace randlora {
namespace {

constexpr int64_t kFewest = 64;  // tokens of a chunk
constexpr int64_t kSpan = 512;   // tokens of a span, about
// Of z, and as many of w.
constexpr int64_t kBytesInCaches = int64_t{1} << 20, kMostBytes = int64_t{64} << 20;

// With 512 slots, all of which run at once, the longest would have this many tokens. The fewest
// slots with which it has no more suffice, since each writes K sums.
int64_t slots_on_card(int64_t tokens) {
  const int64_t longest = std::max<int64_t>((tokens + 511) / 512, 1);
  return (tokens + longest - 1) / longest;
}

// One for 16 tokens, but at most 64, since each writes K sums.
int64_t slots_on_cpu(int64_t tokens) { return std::min<int64_t>((tokens + 15) / 16, 64); }

}  // namespace

Chunks::Chunks(const HadamardSizes& sizes, int64_t T, DType dtype, const Tensor& like)
    : in_caches(!runs_on_cuda(like) && bytes_of(class_dtype(dtype)) > 2), tokens(T) {
  // On AMD's processors MKL computes products of at most 128 elements (here n x n) token by token,
  // and their error grows with the root of the number of tokens. There spans keep it small.
  const bool in_spans = in_caches && sizes.n <= 11;
  const int64_t bytes_of_token = sizes.classes() * sizes.n * bytes_of(class_dtype(dtype));
  const int64_t limit = in_caches ? kBytesInCaches : kMostBytes;
  int64_t most = std::max(limit / bytes_of_token, kFewest);
  if (in_spans) most = std::min(most, kSpan);
  count = (T + most - 1) / most;
  // Rows of z that one token reads should not all fall into the same sets of a cache.
  if (in_caches && T >= kFewest)
    while (count < T && (T + count - 1) / count % 16 == 0) ++count;
  largest = count ? (T + count - 1) / count : 0;
  slots = runs_on_cuda(like) ? slots_on_card(largest) : slots_on_cpu(largest);
  spans = 1;
  if (in_spans && count > 0) spans = std::min((T + kSpan - 1) / kSpan, count);
}

Chunk Chunks::at(int64_t number) const {
  Chunk chunk;
  chunk.number = number;
  chunk.first = number * tokens / count;
  chunk.tokens = (number + 1) * tokens / count - chunk.first;
  chunk.span = span_of(number);
  chunk.begins_span = number == 0 || span_of(number - 1) != chunk.span;
  return chunk;
}

}  // namespace randlora
