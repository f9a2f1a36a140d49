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

// Where the runs of line q begin and end.
struct Runs {
  const int64_t* offset = nullptr;

  RANDLORA_HD_MEMBER int64_t plus(int64_t q) const { return offset[2 * q]; }
  RANDLORA_HD_MEMBER int64_t minus(int64_t q) const { return offset[2 * q + 1]; }
  RANDLORA_HD_MEMBER int64_t end(int64_t q) const { return offset[2 * q + 2]; }
};

template <class Index_>  // uint16_t if every position fits, else uint32_t
struct Lists : Runs {
  using Index = Index_;
  const Index* index;
};

// Lists of either type, for the operator structs.
struct AnyLists : Runs {
  const void* index = nullptr;
  int64_t count = 0;  // total entries; with CUDA the host cannot read `offset`
  bool wide = false;  // positions are uint32, not uint16

  // For loops that have much to do for each entry; others take `typed`.
  RANDLORA_HOST_MEMBER int64_t at(int64_t entry) const {
    return wide ? int64_t{static_cast<const uint32_t*>(index)[entry]}
                : int64_t{static_cast<const uint16_t*>(index)[entry]};
  }
  // fn(the lists as what they are)
  template <class F>
  RANDLORA_HOST_MEMBER auto typed(const F& fn) const {
    return wide ? fn(Lists<uint32_t>{{offset}, static_cast<const uint32_t*>(index)})
                : fn(Lists<uint16_t>{{offset}, static_cast<const uint16_t*>(index)});
  }
};

}  // namespace randlora
