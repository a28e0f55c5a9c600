// Compiles csrc/core for the device: every divergence over one row in one thread.
#include "../core/divergences.h"
#include "../core/params.h"
#include "../core/softmax_state.h"

namespace kd::generic {

template <class Divergence>
__global__ void one_row(const float* student, const float* teacher, int vocab,
                        Divergence divergence, float* value, float* slopes) {
  SoftmaxState<float> s, t;
  for (int i = 0; i < vocab; ++i) {
    s.merge({student[i], 1.0f}, 1.0f);
    t.merge({teacher[i], 1.0f}, 1.0f);
  }
  *value = s.valid() && t.valid() ? 0.0f : NAN;
  const float s_lse = s.max + logf(s.sum), t_lse = t.max + logf(t.sum);
  for (int i = 0; i < vocab; ++i) {
    Point<float> x;
    x.log_q = student[i] - s_lse;
    x.log_p = teacher[i] - t_lse;
    x.q = exp(x.log_q);
    x.p = exp(x.log_p);
    x.r = x.log_q - x.log_p;
    const Term<float> term = divergence(x);
    *value += term.value;
    slopes[i] = term.slope;
  }
}

#define KD_INSTANTIATE(name, Divergence) \
  template __global__ void one_row(const float*, const float*, int, Divergence, float*, float*);
KD_DIVERGENCES(KD_INSTANTIATE)

}  // namespace kd::generic
