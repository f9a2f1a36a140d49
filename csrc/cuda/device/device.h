// core/device.h together with the CUDA language, for sources that hold kernels.
#pragma once
#include "../../core/device.h"
#include "cuda_or_cpu.h"
