#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace randlora {

#if defined(__x86_64__)
namespace avx512 {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
#endif
namespace portable {
const Kernels& kernels();
}

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  // No check for -mf16c: every processor with AVX2 has it.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::kernels());
  if (has_avx2) found.push_back(&avx2::kernels());
#endif
  found.push_back(&portable::kernels());
  return found;
}

const Kernels& choose() {
  const auto sets = available();
  const char* wanted = std::getenv("RANDLORA_ISA");
  if (wanted == nullptr || *wanted == '\0') return *sets.front();
  std::string names;
  for (const Kernels* set : sets) {
    if (std::string(set->isa) == wanted) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->isa);
  }
  throw std::runtime_error("RANDLORA_ISA is '" + std::string(wanted) +
                           "', but this build on this processor has: " + names);
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : available()) names.push_back(set->isa);
  return names;
}

std::vector<std::string> built_isas() {
#if defined(__x86_64__)
  return {"avx512", "avx2", "portable"};
#else
  return {"portable"};
#endif
}

}  // namespace randlora
