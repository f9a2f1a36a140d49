#define RANDLORA_ISA avx2
#define RANDLORA_VECTOR_BYTES 32
#include "kernel_table.h"
