// Checks of index values, before any kernel reads by them. PyTorch's bindings turn
// std::out_of_range into IndexError and std::invalid_argument into ValueError.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/tensors.h"

namespace introkernels::cpu {

// Throws std::out_of_range for a target outside [0, num_classes) that is not ignore_index.
void check_targets(const Indices& target, int64_t num_classes, int64_t ignore_index);

// Throws std::out_of_range for a class outside [0, num_classes), and std::invalid_argument for a
// row that names a class twice or lacks its target. Ignored rows may hold anything.
void check_class_index(const Indices& class_index, const Indices& target, int64_t num_classes,
                       int64_t ignore_index);

// The class indices of a call, checked; none where it has none.
std::optional<Indices> checked_class_index(const std::optional<Tensor>& class_index,
                                           const Indices& target, int64_t num_classes,
                                           int64_t ignore_index);

}  // namespace introkernels::cpu
