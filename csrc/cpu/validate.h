// The indices of a call: see common/validate.h.
#pragma once

#include <cstdint>
#include <optional>

#include "common/validate.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// The class indices of a call, checked; none where it has none.
std::optional<Indices> checked_class_index(const std::optional<Tensor>& class_index,
                                           const Indices& target, int64_t num_classes,
                                           int64_t ignore_index);

// positions [B]: where each row's target stands among its explained classes, -1 in ignored rows.
// All indices have been checked.
void find_targets(const Indices& target, const std::optional<Indices>& class_index,
                  int64_t ignore_index, int64_t* positions);

}  // namespace introkernels::cpu
