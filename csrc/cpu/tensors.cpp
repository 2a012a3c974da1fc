#include "cpu/tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <stdexcept>

namespace introkernels::cpu {

namespace {

template <typename T>
void load(const void* source, int64_t stride, int64_t count, double* out) {
  const T* values = static_cast<const T*>(source);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(values[i * stride]);
  }
}

template <typename T>
void store(const double* values, int64_t stride, int64_t count, void* destination) {
  T* out = static_cast<T*>(destination);
  for (int64_t i = 0; i < count; ++i) out[i * stride] = static_cast<T>(values[i]);
}

[[noreturn]] void refuse_dtype() {
  throw std::invalid_argument(
      "introkernels: a tensor must be float64, float32, bfloat16 or float16");
}

std::vector<int64_t> to_vector(torch::headeronly::IntHeaderOnlyArrayRef values) {
  return {values.begin(), values.end()};
}

}  // namespace

Load load_for(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return load<double>;
    case ScalarType::Float:
      return load<float>;
    case ScalarType::BFloat16:
      return load<torch::headeronly::BFloat16>;
    case ScalarType::Half:
      return load<torch::headeronly::Half>;
    default:
      refuse_dtype();
  }
}

Store store_for(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return store<double>;
    case ScalarType::Float:
      return store<float>;
    case ScalarType::BFloat16:
      return store<torch::headeronly::BFloat16>;
    case ScalarType::Half:
      return store<torch::headeronly::Half>;
    default:
      refuse_dtype();
  }
}

int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      refuse_dtype();
  }
}

Input::Input(const Tensor& tensor)
    : data_(static_cast<const char*>(tensor.const_data_ptr())),
      item_size_(item_size(tensor.scalar_type())),
      load_(load_for(tensor.scalar_type())),
      sizes_(to_vector(tensor.sizes())),
      strides_(to_vector(tensor.strides())) {}

Output::Output(const Tensor& tensor)
    : data_(static_cast<char*>(tensor.mutable_data_ptr())),
      item_size_(item_size(tensor.scalar_type())),
      row_size_(tensor.dim() == 2 ? tensor.size(1) : 1),
      store_(store_for(tensor.scalar_type())) {}

Indices::Indices(const Tensor& tensor)
    : data_(static_cast<const int64_t*>(tensor.const_data_ptr())),
      sizes_(to_vector(tensor.sizes())),
      strides_(to_vector(tensor.strides())) {
  if (tensor.scalar_type() != ScalarType::Long) {
    throw std::invalid_argument("introkernels: an index tensor must be int64");
  }
}

std::vector<double> values_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  const Input input(*tensor);
  std::vector<double> values(static_cast<size_t>(input.size(0)));
  for (size_t i = 0; i < values.size(); ++i) values[i] = input.read(static_cast<int64_t>(i));
  return values;
}

ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

int64_t row_grain(int64_t elements_per_row) {
  // A few tens of microseconds of work: below that a thread costs more than it brings.
  constexpr int64_t kElementsPerTask = 4096;
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
}

}  // namespace introkernels::cpu
