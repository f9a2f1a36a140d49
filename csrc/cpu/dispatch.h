// Chooses the kernels for this machine.
#pragma once
#include <string>
#include <vector>

#include "../core/operators.h"

namespace randlora {

// The best set that both this build and this processor have, or the one named by the environment
// variable RANDLORA_ISA. Throws std::runtime_error if that one cannot run. Decided once.
const Kernels& cpu_kernels();

// The sets that both this build and this processor have, and all sets of this build; best first.
std::vector<std::string> available_isas();
std::vector<std::string> built_isas();

}  // namespace randlora
