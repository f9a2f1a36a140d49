// Records which kernels a test started; tools/cuda/every_kernel.py checks that all are started, and
// tests/gpu counts launches.
#pragma once
#include <dlfcn.h>
#include <stdlib.h>

#include <fstream>
#include <set>

namespace cuda_on_cpu {

// Writes, once per kernel, the file with its code and the position there to the file named by
// CUDA_ON_CPU_KERNELS.
inline void note_start(const void* kernel) {
  static const char* name = getenv("CUDA_ON_CPU_KERNELS");
  static std::ofstream file(name ? name : "/dev/null");
  static std::set<const void*> seen;
  Dl_info where;
  if (!name || !seen.insert(kernel).second || !dladdr(kernel, &where)) return;
  file << where.dli_fname << ' '
       << static_cast<const char*>(kernel) - static_cast<const char*>(where.dli_fbase) << std::endl;
}

// Appends each launch, and how many thread blocks it has along x, to the file named by
// CUDA_ON_CPU_LAUNCHES.
inline void note_launch(const char* kernel, unsigned blocks) {
  if (const char* name = getenv("CUDA_ON_CPU_LAUNCHES"))
    std::ofstream(name, std::ios::app) << kernel << ' ' << blocks << std::endl;
}

}  // namespace cuda_on_cpu
