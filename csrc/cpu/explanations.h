// Gradients [B, K, *S] and inputs [B, *S] as rows of D numbers, in whatever order and with whatever
// gaps they lie in memory. Inner products don't care about the order of the D dimensions as long as
// both tensors share it, so they are walked in the order in which the gradients lie.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "cpu/tensors.h"

namespace introkernels::cpu {

// Kernels read arrays of a slice in whole vectors.
constexpr int64_t kPadding = 16;

constexpr int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// Numbers at several strides, walked as one long row.
class StridedRow {
 public:
  void append(int64_t size, int64_t stride);

  // All numbers lie in one piece, one after the other.
  bool is_contiguous() const { return num_dims_ == 1 && dims_[0].stride == 1; }

  // Numbers [begin, begin + count) of the row that starts at `source`, as T.
  template <typename T>
  void read(Number number, int64_t item_size, const char* source, int64_t begin, int64_t count,
            T* out) const;

 private:
  struct Dim {
    int64_t size;
    int64_t stride;
  };
  static constexpr int kMaxDims = 64;  // of a tensor of PyTorch

  std::array<Dim, kMaxDims> dims_;  // the innermost last
  int num_dims_ = 0;
};

// Which classes of each row are explained: those that a class_index [B, K] names, or all in order.
class ExplainedClasses {
 public:
  // Throws for targets and classes that there are not, see common/validate.h.
  ExplainedClasses(const Indices& target, const std::optional<Tensor>& class_index,
                   int64_t num_classes, int64_t ignore_index);

  // Whether all classes are explained, in order; else class_index says which.
  bool are_all() const { return !class_index_; }
  // Explained class number k of a row; there has to be a class_index.
  int64_t operator()(int64_t row, int64_t k) const { return (*class_index_)(row, k); }
  // Where a row's target stands among its explained classes; -1 in an ignored row.
  int64_t target_position(int64_t row) const;

 private:
  const Indices& target_;
  std::optional<Indices> class_index_;
  int64_t ignore_index_;
};

class Explanations {
 public:
  Explanations(const Tensor& gradients, const Tensor& inputs);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_explained() const { return num_explained_; }
  int64_t num_dims() const { return num_dims_; }

  Number number() const { return gradient_number_; }
  // Whether the gradient of a class is one piece of memory, at gradient(row, k, begin).
  bool in_one_piece() const { return gradient_dims_.is_contiguous(); }
  const char* gradient(int64_t row, int64_t k, int64_t begin) const {
    return gradients_ + (row * row_stride_ + k * class_stride_ + begin) * gradient_size_;
  }
  int64_t class_stride_in_bytes() const { return class_stride_ * gradient_size_; }

  template <typename T>
  void read_gradient(int64_t row, int64_t k, int64_t begin, int64_t count, T* out) const {
    gradient_dims_.read(gradient_number_, gradient_size_, gradient(row, k, 0), begin, count, out);
  }
  // Where the inputs of a row lie if they lie there as whole vectors of T, else a copy in scratch,
  // filled up with 0 to whole vectors.
  template <typename T>
  const T* inputs(int64_t row, int64_t begin, int64_t count, T* scratch) const {
    const char* const source = inputs_ + row * input_row_stride_ * input_size_;
    const bool is_t = input_number_ == number_as<T>();
    if (is_t && input_dims_.is_contiguous() && count % kPadding == 0) {
      return reinterpret_cast<const T*>(source) + begin;
    }
    input_dims_.read(input_number_, input_size_, source, begin, count, scratch);
    std::fill(scratch + count, scratch + padded(count), T(0));
    return scratch;
  }

 private:
  const char* gradients_;
  const char* inputs_;
  Number gradient_number_;
  Number input_number_;
  int64_t gradient_size_;
  int64_t input_size_;
  int64_t num_rows_;
  int64_t num_explained_;
  int64_t num_dims_ = 1;
  int64_t row_stride_;
  int64_t class_stride_;
  int64_t input_row_stride_;
  StridedRow gradient_dims_;
  StridedRow input_dims_;
};

}  // namespace introkernels::cpu
