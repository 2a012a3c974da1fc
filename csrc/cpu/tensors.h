// How the CPU kernels see tensors: rows of any dtype and stride, read into float64 and written
// back. All arithmetic of a row is done in float64, so that it is accurate for every dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace introkernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reads count numbers that lie stride elements apart, and writes likewise.
using Load = void (*)(const void* source, int64_t stride, int64_t count, double* out);
using Store = void (*)(const double* values, int64_t stride, int64_t count, void* destination);

// Throw std::invalid_argument (ValueError in Python) for a dtype that is not floating.
Load load_for(ScalarType dtype);
Store store_for(ScalarType dtype);

// Bytes of an element; throws like load_for.
int64_t item_size(ScalarType dtype);

// A floating tensor of up to three dimensions to read from; it borrows the tensor's memory.
class Input {
 public:
  explicit Input(const Tensor& tensor);

  int64_t size(int64_t dim) const { return sizes_[dim]; }

  // Row `row`, elements [begin, begin + count) of the last dimension of a 2-D tensor.
  void read(int64_t row, int64_t begin, int64_t count, double* out) const {
    load_(at(row * strides_[0] + begin * strides_[1]), strides_[1], count, out);
  }
  // Row `row`, slice `middle`, elements [begin, begin + count) of a 3-D tensor.
  void read(int64_t row, int64_t middle, int64_t begin, int64_t count, double* out) const {
    load_(at(row * strides_[0] + middle * strides_[1] + begin * strides_[2]), strides_[2], count,
          out);
  }
  // Element `index` of a 1-D tensor, or of a scalar (index 0).
  double read(int64_t index) const {
    double value;
    load_(at(sizes_.empty() ? 0 : index * strides_[0]), 1, 1, &value);
    return value;
  }

 private:
  const void* at(int64_t offset) const { return data_ + offset * item_size_; }

  const char* data_;
  int64_t item_size_;
  Load load_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
};

// A contiguous floating tensor of the kernel's own, to be written row by row.
class Output {
 public:
  explicit Output(const Tensor& tensor);

  void write(int64_t row, const double* values) const {
    store_(values, 1, row_size_, data_ + row * row_size_ * item_size_);
  }

 private:
  char* data_;
  int64_t item_size_;
  int64_t row_size_;
  Store store_;
};

// An int64 tensor of one or two dimensions; throws std::invalid_argument for another dtype.
class Indices {
 public:
  explicit Indices(const Tensor& tensor);

  int64_t operator()(int64_t row) const { return data_[row * strides_[0]]; }
  int64_t operator()(int64_t row, int64_t column) const {
    return data_[row * strides_[0] + column * strides_[1]];
  }
  void read(int64_t row, int64_t* out) const {
    for (int64_t k = 0; k < sizes_[1]; ++k) out[k] = (*this)(row, k);
  }
  int64_t size(int64_t dim) const { return sizes_[dim]; }

 private:
  const int64_t* data_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
};

// The values of an optional 1-D floating tensor; empty where there is none.
std::vector<double> values_of(const std::optional<Tensor>& tensor);

// float64 for float64, float32 for everything else: the dtype of losses and statistics.
ScalarType wide_dtype(const Tensor& tensor);

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Rows to hand one thread at least, so that starting it pays.
int64_t row_grain(int64_t elements_per_row);

}  // namespace introkernels::cpu
