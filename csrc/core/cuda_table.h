// The CUDA library as the binding sees it: one exported symbol that returns a table of functions.
//
// The library (csrc/cuda, built by nvcc) does not depend on torch, and the binding includes no CUDA
// headers. The binding opens the library at run time if torch has CUDA, and compares `interface`
// before it reads anything else.
#pragma once
#include "device.h"
#include "hadamard.h"
#include "operators.h"

namespace randlora {

struct CudaKernels {
  uint64_t interface;  // the library's own kCudaInterface
  const char* build;   // compiler and architectures: "nvcc 13.0: 800,900"

  // Fills in multiprocessors and shared_bytes for GPU `index`.
  void (*describe)(int index, Device& device);
  // Makes GPU `index` current for this thread.
  void (*make_current)(int index);
  // Makes GPU `index` current. Null, or why it cannot run the kernels: the library was built for
  // other GPUs.
  const char* (*refusal)(int index);

  // csrc/cuda/kernels.h
  void (*support_tables)(const Lists& a, int64_t r, int64_t d, int32_t* tables, Device&);
  bool (*hadamard_fits)(const HadamardSizes& sizes, DType dtype, const Device&);
#define RANDLORA_MEMBER(name, Operator) void (*name)(const Operator&, Device&);
  RANDLORA_OPERATORS(RANDLORA_MEMBER)
#undef RANDLORA_MEMBER
};

// A hash of csrc/core/*.h: both libraries must agree on the layout of the structs and classes
// there. setup.py and CMakeLists.txt compute it.
constexpr uint64_t kCudaInterface = RANDLORA_CUDA_INTERFACE;

constexpr const char* kCudaSymbol = "randlora_cuda_kernels";
using CudaKernelsFunction = const CudaKernels* (*)();

}  // namespace randlora
