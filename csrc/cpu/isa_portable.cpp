// Compiled with the flags of its instruction set (setup.py and CMakeLists.txt: kernel_flags).
#define RANDLORA_ISA portable
#define RANDLORA_VECTOR_BYTES 16
#include "kernel_table.h"
