// AVX-512 with conversion of floats to bfloat16 in hardware.
#define KD_NAMESPACE avx512bf16
#include "instruction_set.h"

namespace kd {

const InstructionSet kAvx512Bf16 = avx512bf16::instruction_set("avx512bf16");

}  // namespace kd
