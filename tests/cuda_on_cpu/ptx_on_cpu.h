// The functions of csrc/cuda/device/ptx.h on the CPU, with the fragment layouts documented there.
#pragma once
#include "core/dtype.h"
#include "cuda_on_cpu.h"

namespace randlora {

template <class T>
void pin(T&) {}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16, CUDA_ON_CPU_SITE);
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16, CUDA_ON_CPU_SITE);

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, CUDA_ON_CPU_SITE);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, CUDA_ON_CPU_SITE);

void store16(void* global, uint32_t a, uint32_t b, uint32_t c, uint32_t d, CUDA_ON_CPU_SITE);
void store8(float* shared, float a, float b, CUDA_ON_CPU_SITE);

// Reads the source at once, and fills the destination with NaN until the wait delivers.
void cp_async16(void* shared, const void* global, int bytes = 16, CUDA_ON_CPU_SITE);
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int Pending>
void cp_async_wait() {
  void* to;
  uint64_t data[2];
  while (cuda_on_cpu::pop_copy(Pending, &to, data)) memcpy(to, data, 16);
}

}  // namespace randlora
