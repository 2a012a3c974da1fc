// Teacher logits of explanations. The loop is the compiler's to vectorise: beside the products that
// made the statistics it is short.
#pragma once

#include "common/similarity.h"
#include "cpu/kernels.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

template <typename S, typename T>
void teacher_logits(const S* dots, const S* sq_norms, int64_t count, int64_t target_position,
                    const Options& options, T* out) {
  const Similarity kind = options.similarity;
  const S sq_norm_target = sq_norms[target_position];
  const S inverse_tau = S(1 / options.similarity_temperature);
  for (int64_t k = 0; k < count; ++k) {
    out[k] =
        T((similarity_to_target(dots[k], sq_norms[k], sq_norm_target, kind) - S(1)) * inverse_tau);
  }
  out[target_position] = T(0);
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
