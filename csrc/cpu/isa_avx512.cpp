// Compiled with the flags of its instruction set (setup.py and CMakeLists.txt: kernel_flags).
#define RANDLORA_ISA avx512
#define RANDLORA_VECTOR_BYTES 64
#include "kernel_table.h"
