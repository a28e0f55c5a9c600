#define KD_NAMESPACE baseline
#include "instruction_set.h"

namespace kd {

const InstructionSet kBaseline = baseline::instruction_set("baseline");

}  // namespace kd
