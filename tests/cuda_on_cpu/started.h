// Which kernels a test started: tools/cuda/every_kernel.py asks whether all of them ever are.
#pragma once
#include <dlfcn.h>
#include <stdlib.h>

#include <fstream>
#include <set>

namespace cuda_on_cpu {

// Writes to the file that CUDA_ON_CPU_KERNELS names which file has the kernel's code, and where in
// it; once for every kernel.
inline void note_start(const void* kernel) {
  static const char* name = getenv("CUDA_ON_CPU_KERNELS");
  static std::ofstream file(name ? name : "/dev/null");
  static std::set<const void*> seen;
  Dl_info where;
  if (!name || !seen.insert(kernel).second || !dladdr(kernel, &where)) return;
  file << where.dli_fname << ' '
       << static_cast<const char*>(kernel) - static_cast<const char*>(where.dli_fbase) << std::endl;
}

}  // namespace cuda_on_cpu
