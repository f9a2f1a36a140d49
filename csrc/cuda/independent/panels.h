// Token panels: an operand (T, features) transposed in blocks, so that the tokens of each feature
// lie side by side. Tokens past T are zero.
//
//   z[p * width + w][f]  at  data[(p * features + f) * width + w]
#pragma once
#include "../device/launch.h"

namespace randlora::cuda {

struct Panels {
  void* data;
  int64_t features, width;  // `width` tokens in each
};

// Room for the panels of T tokens. A row of a panel is a whole number of 16-byte pieces.
inline Panels make_panels(int64_t T, int64_t features, int64_t width, DType dtype, Device& device) {
  const int64_t tokens = ceil_div(T, width) * width;
  return {device.scratch(static_cast<size_t>(tokens * features * bytes_of(dtype))), features,
          width};
}

// panels.cu: the first ceil(T / width) panels from z (T, features).
void fill_panels(const void* z, int64_t T, const Panels& panels, DType dtype, Device& device);

}  // namespace randlora::cuda
