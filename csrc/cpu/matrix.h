// Matrices as kernels of wide numbers (float, or double for float64) see them.
#pragma once

#include "cpu/tensors.h"

namespace introkernels::cpu {

// A 2-D tensor of any floating dtype and strides, read as rows of T; it borrows the tensor's
// memory.
template <typename T>
class MatrixRows {
 public:
  explicit MatrixRows(const Tensor& matrix)
      : data_(static_cast<const char*>(matrix.const_data_ptr())),
        number_(number_of(matrix.scalar_type())),
        rows_(matrix.size(0)),
        columns_(matrix.size(1)),
        row_bytes_(matrix.stride(0) * item_size(matrix.scalar_type())),
        column_stride_(matrix.stride(1)),
        column_bytes_(column_stride_ * item_size(matrix.scalar_type())) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // Elements [begin, begin + count) of a row: in place where they lie side by side as T, else
  // converted into the buffer.
  const T* read(int64_t row, int64_t begin, int64_t count, T* buffer) const {
    const char* const source = data_ + row * row_bytes_ + begin * column_bytes_;
    if (column_stride_ == 1 && number_ == number_as<T>()) {
      return reinterpret_cast<const T*>(source);
    }
    load_numbers(number_, source, column_stride_, count, buffer);
    return buffer;
  }

 private:
  const char* data_;
  Number number_;
  int64_t rows_;
  int64_t columns_;
  int64_t row_bytes_;
  int64_t column_stride_;
  int64_t column_bytes_;
};

// A matrix of T in memory that somebody else owns; numbers of a row lie side by side.
template <typename T>
struct MatrixOf {
  T* data;
  int64_t stride;  // from row to row

  T* row(int64_t index) const { return data + index * stride; }
};

// All of a contiguous 2-D tensor, to be written.
template <typename T>
MatrixOf<T> matrix_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(1)};
}

}  // namespace introkernels::cpu
