// The CPU kernels, and the choice among them for this machine.
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

// packing.cpp, which every set shares: a basis is packed once.
void pack_dense(const PackDense& p, Runtime& rt);
void count_lists(const CountLists& p, Runtime& rt);
void fill_lists(const FillLists& p, Runtime& rt);
void planes_to_dense(const PlanesToDense& p, Runtime& rt);

}  // namespace randlora
