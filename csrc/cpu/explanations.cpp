#include "cpu/explanations.h"

#include <algorithm>
#include <numeric>

namespace introkernels::cpu {

void StridedRow::append(int64_t size, int64_t stride) {
  if (num_dims_ > 0) {
    Dim& outer = dims_[static_cast<size_t>(num_dims_ - 1)];
    // Dimensions that follow each other without a gap are one; one of size 1 is none.
    if (outer.size == 1 || outer.stride == size * stride) {
      outer = {outer.size * size, stride};
      return;
    }
  }
  if (size == 1 && num_dims_ > 0) return;
  dims_[static_cast<size_t>(num_dims_)] = {size, size == 1 ? 1 : stride};
  ++num_dims_;
}

template <typename T>
void StridedRow::read(Number number, int64_t item_size, const char* source, int64_t begin,
                      int64_t count, T* out) const {
  const Dim inner = dims_[static_cast<size_t>(num_dims_ - 1)];
  while (count > 0) {
    int64_t outer = begin / inner.size;
    const int64_t first = begin % inner.size;
    const int64_t length = std::min(count, inner.size - first);
    int64_t offset = first * inner.stride;
    for (int i = num_dims_ - 2; i >= 0; --i) {
      const Dim dim = dims_[static_cast<size_t>(i)];
      offset += outer % dim.size * dim.stride;
      outer /= dim.size;
    }
    load_numbers(number, source + offset * item_size, inner.stride, length, out);
    begin += length;
    count -= length;
    out += length;
  }
}

template void StridedRow::read(Number, int64_t, const char*, int64_t, int64_t, float*) const;
template void StridedRow::read(Number, int64_t, const char*, int64_t, int64_t, double*) const;

ExplainedClasses::ExplainedClasses(const Indices& target, const std::optional<Tensor>& class_index,
                                   int64_t num_classes, int64_t ignore_index)
    : target_(target), ignore_index_(ignore_index) {
  check_targets(target, num_classes, ignore_index);
  if (!class_index) return;
  class_index_.emplace(*class_index);
  check_class_index(*class_index_, target, num_classes, ignore_index);
}

int64_t ExplainedClasses::target_position(int64_t row) const {
  const int64_t y = target_(row);
  if (y == ignore_index_) return -1;
  if (!class_index_) return y;
  int64_t position = 0;
  while ((*this)(row, position) != y) ++position;
  return position;
}

Explanations::Explanations(const Tensor& gradients, const Tensor& inputs)
    : gradients_(static_cast<const char*>(gradients.const_data_ptr())),
      inputs_(static_cast<const char*>(inputs.const_data_ptr())),
      gradient_number_(number_of(gradients.scalar_type())),
      input_number_(number_of(inputs.scalar_type())),
      gradient_size_(item_size(gradients.scalar_type())),
      input_size_(item_size(inputs.scalar_type())),
      num_rows_(gradients.size(0)),
      num_explained_(gradients.size(1)),
      row_stride_(gradients.stride(0)),
      class_stride_(gradients.stride(1)),
      input_row_stride_(inputs.stride(0)) {
  std::array<int64_t, 64> order;
  const auto last = order.begin() + (gradients.dim() - 2);
  std::iota(order.begin(), last, 2);
  std::stable_sort(order.begin(), last,
                   [&](int64_t a, int64_t b) { return gradients.stride(a) > gradients.stride(b); });
  gradient_dims_.append(1, 1);
  input_dims_.append(1, 1);
  for (auto dim = order.begin(); dim != last; ++dim) {
    num_dims_ *= gradients.size(*dim);
    gradient_dims_.append(gradients.size(*dim), gradients.stride(*dim));
    input_dims_.append(gradients.size(*dim), inputs.stride(*dim - 1));
  }
}

}  // namespace introkernels::cpu
