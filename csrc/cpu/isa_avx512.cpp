// Compiled with the flags of its instruction set: ISA_FLAGS in setup.py, ISAS in CMakeLists.txt.
#define RANDLORA_ISA avx512
#define RANDLORA_VECTOR_BYTES 64
#include "kernel_table.h"
