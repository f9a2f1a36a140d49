#define RANDLORA_ISA portable
#define RANDLORA_VECTOR_BYTES 16
#include "kernel_table.h"
