// The Device of core/device.h for sources that hold kernels: with the CUDA language around it.
#pragma once
#include "../../core/device.h"
#include "cuda_or_cpu.h"
