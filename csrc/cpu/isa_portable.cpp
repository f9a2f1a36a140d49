// Compiled with the flags of its instruction set: ISA_FLAGS in setup.py, ISAS in CMakeLists.txt.
#define RANDLORA_ISA portable
#define RANDLORA_VECTOR_BYTES 16
#include "kernel_table.h"
