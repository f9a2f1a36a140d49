#define RANDLORA_ISA avx512
#define RANDLORA_VECTOR_BYTES 64
#include "kernel_table.h"
