// Which kernels run on this machine.
#pragma once
#include <string>
#include <vector>

#include "../core/operators.h"

namespace randlora {

// The best set that both this build and this processor have, or the one that the environment
// variable RANDLORA_ISA names; std::runtime_error where that one cannot run. Decided once.
const Kernels& cpu_kernels();

// Sets that this build and this processor have, and those that this build has; best first.
std::vector<std::string> available_isas();
std::vector<std::string> built_isas();

}  // namespace randlora
