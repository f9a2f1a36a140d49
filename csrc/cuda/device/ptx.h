// Instructions that CUDA C++ has no name for, a function each. Fragment layouts are those of
// the PTX manual; with lane = threadIdx.x % 32, g = lane / 4, q = lane % 4:
//
//   mma m16n8k16           a[0] = A[g][2q, 2q+1]     a[1] = A[g+8][2q, 2q+1]
//                          a[2] = A[g][2q+8, 2q+9]   a[3] = A[g+8][2q+8, 2q+9]
//                          b[0] = B[2q, 2q+1][g]     b[1] = B[2q+8, 2q+9][g]
//                          c[0], c[1] = C[g][2q, 2q+1]   c[2], c[3] = C[g+8][2q, 2q+1]
//   ldmatrix x4            four 8 x 8 matrices of 16-bit elements; lane l gives the address of row
//                          l % 8 of matrix l / 8; r[m] = matrix m [g][2q, 2q+1]
//   ldmatrix x4 trans      r[m] = matrix m [2q, 2q+1][g]
#pragma once
#include "../../core/dtype.h"
#include "cuda_or_cpu.h"

#if !defined(__CUDACC__)
#include "ptx_on_cpu.h"
#else

namespace randlora {

// Forces the value to be loaded here. Otherwise the compiler moves a load behind the branch that
// uses it, and several loads no longer overlap.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void pin(double& value) { asm volatile("" : "+d"(value)); }

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// Stores four words, 16-byte aligned, in one access: nvcc splits an assignment into four.
__device__ __forceinline__ void store16(void* global, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(global), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Stores two numbers, 8-byte aligned, in one access: nvcc splits an assignment into two, whose
// lanes would meet in the same banks.
__device__ __forceinline__ void store8(float* shared, float a, float b) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" : : "r"(to), "f"(a), "f"(b) : "memory");
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned, bypassing registers. Bytes
// past `bytes` become zero (0: nothing is read). Complete after cp_async_wait; other threads see
// the bytes after a barrier.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes = 16) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's committed groups are incomplete.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

}  // namespace randlora

#endif
