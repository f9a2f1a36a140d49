// How a call on Hadamard bases takes its tokens: in chunks, one after the other. Sizes alone
// decide, so that results do not depend on the number of threads.
#pragma once
#include "../backend.h"

namespace randlora {

struct Chunk {
  int64_t number;
  int64_t first, tokens;  // from token `first` on
  int64_t span;
  bool begins_span;
};

struct Chunks {
  // Whether z and w of one chunk should stay in the caches. In bf16 each chunk rounds the gradient
  // of gamma, and on a GPU each costs launches: there only memory limits a chunk.
  bool in_caches;
  int64_t tokens, count;
  int64_t largest;  // tokens of a chunk, at most
  int64_t slots;    // of a chunk, which HadamardDown sums one by one
  int64_t spans;    // over which the gradient of gamma is summed, before these sums are added

  Chunks(const HadamardSizes& sizes, int64_t T, DType dtype, const Tensor& like);
  Chunk at(int64_t number) const;

 private:
  int64_t span_of(int64_t chunk) const { return chunk * spans / count; }
};

}  // namespace randlora
