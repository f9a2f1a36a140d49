// What a CPU kernel needs from its host: threads, and one block of scratch memory per call.
// The torch binding implements it with torch's pool and allocator, the C++ tests with std::thread.
#pragma once
#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace randlora {

class Runtime {
 public:
  virtual ~Runtime() = default;
  virtual int threads() const = 0;
  // Calls task(arg, s) once for every slot s in [0, slots), on any threads, and waits for all.
  virtual void run(int slots, void (*task)(void*, int), void* arg) = 0;
  // 64-byte aligned, not initialised, valid until the operator returns. Ask once per operator: a
  // second request may return the same memory.
  virtual void* scratch(size_t bytes) = 0;

  // fn(slot) for every slot. Each slot owns a fixed share of the work and no sum is split between
  // slots, so results do not depend on the number of threads.
  template <class F>
  RANDLORA_HOST_MEMBER void each_slot(int slots, const F& fn) {
    auto task = [](void* arg, int slot) { (*static_cast<const F*>(arg))(slot); };
    run(slots, task, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // fn(begin, end) over consecutive shares of [0, count), at most `shares` of them. The length of
  // every share but the last is a multiple of `grain`.
  template <class F>
  RANDLORA_HOST_MEMBER void split(int shares, int64_t count, int64_t grain, const F& fn) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t slots = grains < shares ? grains : shares;
    if (slots <= 0) return;
    each_slot(static_cast<int>(slots), [&](int s) {
      const int64_t begin = grains * s / slots * grain;
      const int64_t end = grains * (s + 1) / slots * grain;
      fn(begin, end < count ? end : count);
    });
  }
  // A share for each thread.
  template <class F>
  RANDLORA_HOST_MEMBER void split(int64_t count, int64_t grain, const F& fn) {
    split(threads(), count, grain, fn);
  }
};

// Carves aligned arrays out of one scratch block. A first pass with base = nullptr measures it.
class Arena {
 public:
  RANDLORA_HOST_MEMBER explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class Element>
  RANDLORA_HOST_MEMBER Element* array(int64_t count) {
    char* at = base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(Element) + 63) / 64 * 64;
    return reinterpret_cast<Element*>(at);
  }
  RANDLORA_HOST_MEMBER size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace randlora
