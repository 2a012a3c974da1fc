// How the CPU kernels see tensors: rows of any dtype and stride, read into float (double for
// float64) and written back.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "common/validate.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace introkernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throw std::invalid_argument (ValueError in Python) for a dtype that is not floating.
Number number_of(ScalarType dtype);
int64_t item_size(ScalarType dtype);

// The type of T itself.
template <typename T>
constexpr Number number_as() {
  return std::is_same_v<T, double> ? Number::kFloat64 : Number::kFloat32;
}

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls work(double{}) for float64 tensors and work(float{}) for all others.
template <typename Work>
auto in_precision_of(const Tensor& tensor, const Work& work) {
  return tensor.scalar_type() == ScalarType::Double ? work(double{}) : work(float{});
}

// `count` numbers, `stride` elements apart, as T.
template <typename T>
void load_numbers(Number number, const void* source, int64_t stride, int64_t count, T* out);

// `count` numbers to contiguous memory of that type.
template <typename T>
void store_numbers(Number number, const T* values, int64_t count, void* destination) {
  kernels().of<T>().store[int(number)](values, count, destination);
}

// A floating tensor of up to two dimensions and any strides, to be read as rows of T; it borrows
// the tensor's memory.
class Input {
 public:
  explicit Input(const Tensor& tensor);

  int64_t size(int64_t dim) const { return sizes_[static_cast<size_t>(dim)]; }

  // Elements [begin, begin + count) of a row: where they lie if they lie there side by side as T,
  // else a copy in scratch.
  template <typename T>
  const T* read(int64_t row, int64_t begin, int64_t count, T* scratch) const {
    const void* const source = data_ + (row * strides_[0] + begin * strides_[1]) * item_size_;
    const bool in_place = number_ == number_as<T>() && (strides_[1] == 1 || count <= 1);
    if (in_place) return static_cast<const T*>(source);
    load_numbers(number_, source, strides_[1], count, scratch);
    return scratch;
  }
  template <typename T>
  const T* row(int64_t row, T* scratch) const {
    return read(row, 0, sizes_[1], scratch);
  }

  // Element `index` of a 1-D tensor, or of a scalar (index 0).
  double value(int64_t index) const {
    double value;
    load_numbers(number_, data_ + index * strides_[0] * item_size_, 1, 1, &value);
    return value;
  }

 private:
  const char* data_;
  Number number_;
  int64_t item_size_;
  std::array<int64_t, 2> sizes_{};
  std::array<int64_t, 2> strides_{};
};

// A contiguous floating tensor [B, C] of the kernel's own, to be written row by row.
class Output {
 public:
  explicit Output(const Tensor& tensor);

  // Where to put a row of T: the tensor itself if that is its type, else scratch.
  template <typename T>
  T* row(int64_t row, T* scratch) const {
    return number_ == number_as<T>() ? reinterpret_cast<T*>(at(row)) : scratch;
  }

  // Writes what row() gave, unless it is there already.
  template <typename T>
  void finish(int64_t row, const T* values) const {
    if (static_cast<const void*>(values) != at(row)) {
      store_numbers(number_, values, row_size_, at(row));
    }
  }

  template <typename T>
  void write(int64_t row, const T* values) const {
    store_numbers(number_, values, row_size_, at(row));
  }

 private:
  char* at(int64_t row) const { return data_ + row * row_size_ * item_size_; }

  char* data_;
  Number number_;
  int64_t item_size_;
  int64_t row_size_;
};

// An int64 tensor of one or two dimensions; throws std::invalid_argument for another dtype.
class Indices : public IndexView {
 public:
  explicit Indices(const Tensor& tensor);
};

// The values of an optional 1-D tensor; data() is null where there is none.
template <typename T>
class OptionalValues {
 public:
  explicit OptionalValues(const std::optional<Tensor>& tensor)
      : values_(tensor ? tensor->size(0) : 0), has_values_(tensor.has_value()) {
    if (!tensor) return;
    load_numbers(number_of(tensor->scalar_type()), tensor->const_data_ptr(), tensor->stride(0),
                 tensor->size(0), values_.get());
  }

  const T* data() const { return has_values_ ? values_.get() : nullptr; }

 private:
  Buffer<T> values_;
  bool has_values_;
};

// float64 for float64, float32 for everything else: the dtype of losses and statistics.
ScalarType wide_dtype(const Tensor& tensor);

// An uninitialised contiguous tensor of up to two dimensions.
Tensor new_empty(std::initializer_list<int64_t> sizes, ScalarType dtype);

// Rows to hand one thread at least, so that starting it pays.
int64_t row_grain(int64_t elements_per_row);

}  // namespace introkernels::cpu
