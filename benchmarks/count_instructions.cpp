// Calls the CPU kernels on fixed data, once per configuration and line of output, for a tool that
// counts the instructions of each call of kd::cpu::logits: see instructions.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"

namespace {

using namespace kd;

constexpr int64_t kRows = 4, kVocab = 4001;  // a whole block and a part of one, padded

// Multiples of 1/64 in [-8, 8).
std::vector<float> logits(uint32_t seed) {
  std::vector<float> result(kRows * kVocab);
  for (float& x : result) {
    seed = seed * 1664525u + 1013904223u;
    x = (float)((int)(seed >> 22) - 512) / 64;
  }
  return result;
}

// The logits in that dtype, cut off where they do not fit.
std::vector<char> stored(const std::vector<float>& logits, DType dtype) {
  std::vector<char> result(logits.size() * item_size(dtype));
  for (size_t i = 0; i < logits.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &logits[i], sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (dtype == DType::kBFloat16) bits >>= 16;
    if (dtype == DType::kFloat16)
      bits = (magnitude ? (magnitude - 0x38000000u) >> 13 : 0) | (bits >> 16 & 0x8000u);
    std::memcpy(&result[i * item_size(dtype)], &bits, item_size(dtype));
  }
  return result;
}

Rows rows_of(std::vector<char>& memory, DType dtype) {
  Rows rows;
  rows.data = memory.data();
  rows.dtype = dtype;
  rows.width = kVocab;
  rows.inner_size = kRows;
  rows.inner_stride = kVocab;
  return rows;
}

}  // namespace

int main() {
  const std::vector<std::string> divergences = cpu::divergences();
  constexpr const char* kDTypes[] = {"float32", "bfloat16", "float16"};
  std::printf("%s\n%lld\n", KD_COMPILER, (long long)(kRows * kVocab));
  for (size_t divergence = 0; divergence < divergences.size(); ++divergence)
    for (int dtype = 0; dtype < 3; ++dtype)
      for (const bool with_gradient : {false, true}) {
        const DType kind = static_cast<DType>(dtype);
        std::vector<char> student = stored(logits(1), kind), teacher = stored(logits(2), kind);
        std::vector<char> gradient(student.size());
        float loss, row_scale[kRows];
        LogitsParams params;
        params.rows = kRows;
        params.vocab = kVocab;
        params.student = rows_of(student, kind);
        params.teacher = rows_of(teacher, kind);
        if (with_gradient) params.gradient = rows_of(gradient, kind);
        if (with_gradient && kind == DType::kFloat16) params.row_scale = row_scale;
        params.divergence = (int)divergence;
        params.parameters[0] = 0.25;  // of the divergences that take some
        params.parameters[1] = 0.75;
        params.temperature = 2;
        params.loss = &loss;
        cpu::logits(params, cpu::chosen(), 1);
        std::printf("%s %s %s\n", divergences[divergence].c_str(), kDTypes[dtype],
                    with_gradient ? "loss+gradient" : "loss");
      }
}
