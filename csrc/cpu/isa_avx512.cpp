#define KD_NAMESPACE avx512
#include "instruction_set.h"

namespace kd {

const InstructionSet kAvx512 = avx512::instruction_set("avx512");

}  // namespace kd
