// The stand-in for csrc/cuda/context.cpp where the kernels run on the CPU: one card, small, and used
// by one thread at a time, for the harness runs one grid at a time.
#include <mutex>

#include "cuda/context.h"

namespace randlora {
namespace cuda {
namespace {

constexpr int kNone = -1;
std::mutex card;

}  // namespace

void describe(int, Device& device) {
  device.multiprocessors = 3;  // so that work is split between blocks also where there is little
  device.shared_bytes = 227 << 10;
}

// CurrentCard (core/cuda_table.h) enters with an index and leaves with what was current before.
int make_current(int index) {
  if (index == kNone) {
    card.unlock();
    return 0;
  }
  card.lock();
  return kNone;
}

}  // namespace cuda
}  // namespace randlora
