// The extension module kdkernels._C. Pointers come in as integers, so that it builds without torch
// and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cuda/dispatch.h"

namespace py = pybind11;

namespace kd {
namespace {

// The fields of a struct in the order in which kdkernels/backends/rows.py makes a tuple of them.
auto fields(Rows& x) {
  return std::tie(x.data, x.dtype, x.width, x.inner_size, x.outer_stride, x.inner_stride);
}

auto fields(LogitsParams& x) {
  return std::tie(x.rows, x.vocab, x.student, x.teacher, x.gradient, x.divergence, x.parameters[0],
                  x.parameters[1], x.temperature, x.student_transform.scale,
                  x.student_transform.softcap, x.teacher_transform.scale,
                  x.teacher_transform.softcap, x.kd_weight, x.ce_weight, x.labels, x.ignore_index,
                  x.token_weight, x.reduction, x.normalizer, x.gradient_scale, x.row_scale, x.loss,
                  x.metrics);
}

auto fields(ShardParams& x) {
  return std::tie(static_cast<LogitsParams&>(x), x.phase, x.entropies, x.states, x.sums);
}

auto fields(TailParams& x) {
  return std::tie(x.rows, x.vocab, x.student, x.gradient, x.transform.scale, x.transform.softcap,
                  x.temperature, x.at_1, x.listed, x.listed_size, x.kept, x.tails, x.grad_tails,
                  x.grad_listed);
}

auto fields(ScaleParams& x) {
  return std::tie(x.rows, x.gradient, x.grad_output, x.grad_output_stride, x.row_scale);
}

// What Python has for it.
template <class T>
using Number = std::conditional_t<std::is_pointer_v<T>, uintptr_t,
                                  std::conditional_t<std::is_enum_v<T>, int, T>>;

// A number, or the tuple of a struct, which None leaves as it is; false where it is neither.
template <class T>
bool read(py::handle from, T& to) {
  if constexpr (std::is_class_v<T>) {
    if (from.is_none()) return true;
    if (!PyTuple_Check(from.ptr())) return false;
    const auto read_all = [&](auto&... field) {
      py::ssize_t i = 0;
      return PyTuple_GET_SIZE(from.ptr()) == sizeof...(field) &&
             (read(PyTuple_GET_ITEM(from.ptr(), i++), field) && ...);
    };
    return std::apply(read_all, fields(to));
  } else {
    py::detail::make_caster<Number<T>> number;
    if (!number.load(from, true)) return false;
    to = (T)(Number<T>)number;
    return true;
  }
}

template <class Params>
Params params_of(py::handle tuple) {
  Params params;
  if (!read(tuple, params)) throw py::type_error("a field of the parameters is not as expected");
  return params;
}

// A function of the kernels for Python.
template <class Params, class Result, class... Where>
auto bound(Result (*run)(const Params&, Where...)) {
  return [run](py::handle tuple, Number<Where>... where) {
    const Params params = params_of<Params>(tuple);
    py::gil_scoped_release release;
    return run(params, (Where)where...);
  };
}

// One that follows what the environment asks for. Without the GIL another thread might be setting
// os.environ, which moves what getenv() reads.
template <class Params, class Choice, class Result, class... Where>
auto bound(Result (*run)(const Params&, Choice, Where...), Choice (*choose)()) {
  return [run, choose](py::handle tuple, Number<Where>... where) {
    const Params params = params_of<Params>(tuple);
    const Choice choice = choose();
    py::gil_scoped_release release;
    return run(params, choice, (Where)where...);
  };
}

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.def("instruction_sets", kd::cpu::instruction_sets,
             "CPU instruction sets of this build that this machine runs, best first.");
  module.def("divergences", kd::cpu::divergences, "Names of the divergences, in kernel order.");
  module.def("logits_cpu", kd::bound(kd::cpu::logits, kd::cpu::chosen),
             "Loss, and gradient where one is given, of all rows.");
  py::class_<kd::cpu::Memory>(module, "Memory", py::buffer_protocol(), py::module_local(),
                              "Bytes for a large tensor, with undefined content.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](kd::cpu::Memory& memory) {
        return py::buffer_info((uint8_t*)memory.data(), (py::ssize_t)memory.size());
      });
  module.def("release_kept_memory", kd::cpu::release_kept_memory,
             "Gives memory that is kept for the next call back to the system; returns its bytes.");
  module.def("shard_cpu", kd::bound(kd::cpu::shard, kd::cpu::chosen),
             "One phase; whether the gradient is written then.");
  module.def("tail_cpu", kd::bound(kd::cpu::tail, kd::cpu::chosen),
             "Log-sum-exps of the columns that are not listed, or their gradient.");
  module.def("scale_cpu", kd::bound(kd::cpu::scale, kd::cpu::chosen),
             "gradient *= grad_output * row_scale, row by row.");
#if defined(KD_WITH_CUDA)
  module.def("cuda_why_not", kd::cuda::why_not,
             "Why a CUDA device cannot be served, or an empty string.");
  module.def("logits_cuda", kd::bound(kd::cuda::logits, kd::cuda::forced_tile),
             "Launches loss, and gradient where one is given.");
  module.def("shard_cuda", kd::bound(kd::cuda::shard),
             "Launches one phase; whether the gradient is written then.");
  module.def("tail_cuda", kd::bound(kd::cuda::tail),
             "Launches log-sum-exps of the columns that are not listed, or their gradient.");
  module.def("scale_cuda", kd::bound(kd::cuda::scale),
             "Launches gradient *= grad_output * row_scale.");
#endif
}
