#include "cpu/validate.h"

namespace introkernels::cpu {

std::optional<Indices> checked_class_index(const std::optional<Tensor>& class_index,
                                           const Indices& target, int64_t num_classes,
                                           int64_t ignore_index) {
  if (!class_index.has_value()) return std::nullopt;
  const Indices index(*class_index);
  check_class_index(index, target, num_classes, ignore_index);
  return index;
}

void find_targets(const Indices& target, const std::optional<Indices>& class_index,
                  int64_t ignore_index, int64_t* positions) {
  for (int64_t row = 0; row < target.size(0); ++row) {
    const int64_t y = target(row);
    int64_t position = y;
    if (y == ignore_index) {
      position = -1;
    } else if (class_index) {
      position = 0;
      while ((*class_index)(row, position) != y) ++position;
    }
    positions[row] = position;
  }
}

}  // namespace introkernels::cpu
