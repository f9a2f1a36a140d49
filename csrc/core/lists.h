// Sorted, sign-split index lists: the packed format of a sparse ternary matrix, by row or column.
//
//   line q:  +1 at index[offset[2q]     .. offset[2q + 1])   ascending
//            -1 at index[offset[2q + 1] .. offset[2q + 2])   ascending
//
// Because runs are split by sign, kernels decode no signs: they add one run and subtract the next.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace randlora {

template <class Index>  // uint16_t if every position fits, else uint32_t
struct Lists {
  const int64_t* offset;
  const Index* index;

  RANDLORA_HD_MEMBER int64_t plus(int64_t q) const { return offset[2 * q]; }
  RANDLORA_HD_MEMBER int64_t minus(int64_t q) const { return offset[2 * q + 1]; }
  RANDLORA_HD_MEMBER int64_t end(int64_t q) const { return offset[2 * q + 2]; }
};

// Lists with the index type erased, for the operator structs.
struct AnyLists {
  const int64_t* offset = nullptr;
  const void* index = nullptr;
  int64_t count = 0;  // total entries; with CUDA the host cannot read `offset`

  template <class Index>
  RANDLORA_HD_MEMBER Lists<Index> as() const {
    return {offset, static_cast<const Index*>(index)};
  }
};

}  // namespace randlora
