// The extension module kdkernels._C. Pointers come in as integers, so that it builds without torch
// and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cuda/dispatch.h"

namespace py = pybind11;

namespace kd {
namespace {

// Address, dtype, width, and the row strides; see Rows.
using RowsArgs = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

Rows to_rows(const RowsArgs& args) {
  Rows rows;
  rows.data = reinterpret_cast<char*>(std::get<0>(args));
  rows.dtype = static_cast<DType>(std::get<1>(args));
  rows.width = std::get<2>(args);
  rows.inner_size = std::get<3>(args);
  rows.outer_stride = std::get<4>(args);
  rows.inner_stride = std::get<5>(args);
  return rows;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What every loss of a row pair takes.
void set_pair(LogitsParams& params, int64_t rows, int64_t vocab, const RowsArgs& student,
              const RowsArgs& teacher, const std::optional<RowsArgs>& gradient, int divergence,
              float parameter_0, float parameter_1, float temperature, float student_scale,
              float student_softcap, float teacher_scale, float teacher_softcap, float kd_weight,
              float ce_weight) {
  params.rows = rows;
  params.vocab = vocab;
  params.student = to_rows(student);
  params.teacher = to_rows(teacher);
  if (gradient) params.gradient = to_rows(*gradient);
  params.divergence = divergence;
  params.parameters[0] = parameter_0;
  params.parameters[1] = parameter_1;
  params.temperature = temperature;
  params.student_transform = {student_scale, student_softcap};
  params.teacher_transform = {teacher_scale, teacher_softcap};
  params.kd_weight = kd_weight;
  params.ce_weight = ce_weight;
}

void logits_cpu(int64_t rows, int64_t vocab, const RowsArgs& student, const RowsArgs& teacher,
                const std::optional<RowsArgs>& gradient, int divergence, float parameter_0,
                float parameter_1, float temperature, float student_scale, float student_softcap,
                float teacher_scale, float teacher_softcap, float kd_weight, float ce_weight,
                uintptr_t labels, int64_t ignore_index, uintptr_t token_weight, int reduction,
                uintptr_t normalizer, float gradient_scale, uintptr_t row_scale, uintptr_t loss,
                uintptr_t metrics, int threads) {
  LogitsParams params;
  set_pair(params, rows, vocab, student, teacher, gradient, divergence, parameter_0, parameter_1,
           temperature, student_scale, student_softcap, teacher_scale, teacher_softcap, kd_weight,
           ce_weight);
  params.labels = pointer<int64_t>(labels);
  params.ignore_index = ignore_index;
  params.token_weight = pointer<float>(token_weight);
  params.reduction = static_cast<Reduction>(reduction);
  params.normalizer = pointer<float>(normalizer);
  params.gradient_scale = gradient_scale;
  params.row_scale = pointer<float>(row_scale);
  params.loss = pointer<float>(loss);
  params.metrics = pointer<float>(metrics);
  py::gil_scoped_release release;
  cpu::logits(params, threads);
}

ShardParams to_shard_params(int phase, int64_t rows, int64_t vocab, const RowsArgs& student,
                            const RowsArgs& teacher, const std::optional<RowsArgs>& gradient,
                            int divergence, float parameter_0, float parameter_1, float temperature,
                            float student_scale, float student_softcap, float teacher_scale,
                            float teacher_softcap, float kd_weight, float ce_weight, bool entropies,
                            uintptr_t labels, uintptr_t weight, float gradient_scale,
                            uintptr_t row_scale, uintptr_t states, uintptr_t sums) {
  ShardParams params;
  params.phase = static_cast<ShardPhase>(phase);
  set_pair(params, rows, vocab, student, teacher, gradient, divergence, parameter_0, parameter_1,
           temperature, student_scale, student_softcap, teacher_scale, teacher_softcap, kd_weight,
           ce_weight);
  params.entropies = entropies;
  params.labels = pointer<int64_t>(labels);
  params.token_weight = pointer<float>(weight);
  params.gradient_scale = gradient_scale;
  params.row_scale = pointer<float>(row_scale);
  params.states = pointer<double>(states);
  params.sums = pointer<double>(sums);
  return params;
}

TailParams to_tail_params(int64_t rows, int64_t vocab, const RowsArgs& student,
                          const std::optional<RowsArgs>& gradient, float temperature, bool at_1,
                          float scale, float softcap, uintptr_t listed, int64_t listed_size,
                          uintptr_t kept, uintptr_t tails, uintptr_t grad_tails,
                          uintptr_t grad_listed) {
  TailParams params;
  params.rows = rows;
  params.vocab = vocab;
  params.student = to_rows(student);
  if (gradient) params.gradient = to_rows(*gradient);
  params.temperature = temperature;
  params.at_1 = at_1;
  params.transform = {scale, softcap};
  params.listed = pointer<int64_t>(listed);
  params.listed_size = listed_size;
  params.kept = pointer<bool>(kept);
  params.tails = pointer<float>(tails);
  params.grad_tails = pointer<float>(grad_tails);
  params.grad_listed = pointer<float>(grad_listed);
  return params;
}

void tail_cpu(int64_t rows, int64_t vocab, const RowsArgs& student,
              const std::optional<RowsArgs>& gradient, float temperature, bool at_1, float scale,
              float softcap, uintptr_t listed, int64_t listed_size, uintptr_t kept, uintptr_t tails,
              uintptr_t grad_tails, uintptr_t grad_listed, int threads) {
  const TailParams params =
      to_tail_params(rows, vocab, student, gradient, temperature, at_1, scale, softcap, listed,
                     listed_size, kept, tails, grad_tails, grad_listed);
  py::gil_scoped_release release;
  cpu::tail(params, threads);
}

void scale_cpu(int64_t rows, const RowsArgs& gradient, uintptr_t grad_output,
               int64_t grad_output_stride, uintptr_t row_scale, int threads) {
  ScaleParams params;
  params.rows = rows;
  params.gradient = to_rows(gradient);
  params.grad_output = pointer<float>(grad_output);
  params.grad_output_stride = grad_output_stride;
  params.row_scale = pointer<float>(row_scale);
  py::gil_scoped_release release;
  cpu::scale(params, threads);
}

#if defined(KD_WITH_CUDA)

void logits_cuda(int64_t rows, int64_t vocab, const RowsArgs& student, const RowsArgs& teacher,
                 const std::optional<RowsArgs>& gradient, int divergence, float parameter_0,
                 float parameter_1, float temperature, float student_scale, float student_softcap,
                 float teacher_scale, float teacher_softcap, float kd_weight, float ce_weight,
                 uintptr_t labels, uintptr_t weight, uintptr_t normalizer, float divisor,
                 float gradient_scale, uintptr_t row_scale, uintptr_t loss, uintptr_t metrics,
                 int device, uintptr_t stream) {
  LogitsParams params;
  set_pair(params, rows, vocab, student, teacher, gradient, divergence, parameter_0, parameter_1,
           temperature, student_scale, student_softcap, teacher_scale, teacher_softcap, kd_weight,
           ce_weight);
  params.labels = pointer<int64_t>(labels);
  params.token_weight = pointer<float>(weight);
  params.reduction = Reduction::kNone;
  params.normalizer = pointer<float>(normalizer);
  params.divisor = divisor;
  params.gradient_scale = gradient_scale;
  params.row_scale = pointer<float>(row_scale);
  params.loss = pointer<float>(loss);
  params.metrics = pointer<float>(metrics);
  py::gil_scoped_release release;
  cuda::logits(params, device, pointer<void>(stream));
}

void tail_cuda(int64_t rows, int64_t vocab, const RowsArgs& student,
               const std::optional<RowsArgs>& gradient, float temperature, bool at_1, float scale,
               float softcap, uintptr_t listed, int64_t listed_size, uintptr_t kept,
               uintptr_t tails, uintptr_t grad_tails, uintptr_t grad_listed, int device,
               uintptr_t stream) {
  const TailParams params =
      to_tail_params(rows, vocab, student, gradient, temperature, at_1, scale, softcap, listed,
                     listed_size, kept, tails, grad_tails, grad_listed);
  py::gil_scoped_release release;
  cuda::tail(params, device, pointer<void>(stream));
}

bool shard_cuda(const ShardParams& params, int device, uintptr_t stream) {
  return cuda::shard(params, device, pointer<void>(stream));
}

void scale_cuda(int64_t rows, const RowsArgs& gradient, uintptr_t grad_output,
                int64_t grad_output_stride, uintptr_t row_scale, int device, uintptr_t stream) {
  ScaleParams params;
  params.rows = rows;
  params.gradient = to_rows(gradient);
  params.grad_output = pointer<float>(grad_output);
  params.grad_output_stride = grad_output_stride;
  params.row_scale = pointer<float>(row_scale);
  py::gil_scoped_release release;
  cuda::scale(params, device, pointer<void>(stream));
}

#endif

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_C, module) {
  module.def("instruction_sets", kd::cpu::instruction_sets,
             "CPU instruction sets of this build that this machine runs, best first.");
  module.def("divergences", kd::cpu::divergences, "Names of the divergences, in kernel order.");
  module.def("logits_cpu", kd::logits_cpu, "Loss, and gradient where one is given, of all rows.");
  py::class_<kd::cpu::Memory>(module, "Memory", py::buffer_protocol(), py::module_local(),
                              "Bytes for a large tensor, with undefined content.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](kd::cpu::Memory& memory) {
        return py::buffer_info((uint8_t*)memory.data(), (py::ssize_t)memory.size());
      });
  module.def("release_kept_memory", kd::cpu::release_kept_memory,
             "Gives memory that is kept for the next call back to the system; returns its bytes.");
  py::class_<kd::ShardParams>(module, "ShardParams", py::module_local(),
                              "One phase of a shard of the vocabulary, see csrc/core/params.h.")
      .def(py::init(&kd::to_shard_params));
  module.def("shard_cpu", kd::cpu::shard, py::call_guard<py::gil_scoped_release>(),
             "One phase; whether the gradient is written then.");
  module.def("tail_cpu", kd::tail_cpu,
             "Log-sum-exps of the columns that are not listed, or their gradient.");
  module.def("scale_cpu", kd::scale_cpu, "gradient *= grad_output * row_scale, row by row.");
#if defined(KD_WITH_CUDA)
  module.def("cuda_why_not", kd::cuda::why_not,
             "Why a CUDA device cannot be served, or an empty string.");
  module.def("logits_cuda", kd::logits_cuda, "Launches loss, and gradient where one is given.");
  module.def("shard_cuda", kd::shard_cuda, py::call_guard<py::gil_scoped_release>(),
             "Launches one phase; whether the gradient is written then.");
  module.def("tail_cuda", kd::tail_cuda,
             "Launches log-sum-exps of the columns that are not listed, or their gradient.");
  module.def("scale_cuda", kd::scale_cuda, "Launches gradient *= grad_output * row_scale.");
#endif
}
