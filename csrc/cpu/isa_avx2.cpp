#define KD_NAMESPACE avx2
#include "instruction_set.h"

namespace kd {

const InstructionSet kAvx2 = avx2::instruction_set("avx2");

}  // namespace kd
