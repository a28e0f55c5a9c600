#define KD_NAMESPACE baseline
#include "rows.h"

namespace kd {

const InstructionSet kBaseline = baseline::instruction_set("baseline");

}  // namespace kd
