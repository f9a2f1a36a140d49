// Facts about a card, and which card is current.
#pragma once
#include "../../core/device.h"

namespace randlora {
namespace cuda {

void describe(int index, Device& device);
void make_current(int index);

}  // namespace cuda
}  // namespace randlora
