// Matrix products of PyTorch's own BLAS, arranged so that their bits don't depend on the number of
// threads.
#pragma once

#include "cpu/tensors.h"

namespace introkernels::cpu {

// A matrix in memory that somebody else owns. Threads of a kernel make tensors of it for
// themselves, which belong to no autograd graph and no inference mode, whatever the tensor they
// came from.
struct MatrixView {
  char* data;
  ScalarType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  // The tensor is 2-D; a view of an input must not be written through.
  static MatrixView of(const Tensor& tensor);

  MatrixView transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
  MatrixView block(int64_t row, int64_t height, int64_t column, int64_t width) const;
  Tensor tensor() const;
};

// out [M, N] = a [M, K] @ b [K, N], all of one dtype, any strides.
void matmul_into(const MatrixView& a, const MatrixView& b, const MatrixView& out);

// sum [M, N] += a [M, K] @ b [K, N], float32 or float64.
void matmul_add_into(const MatrixView& a, const MatrixView& b, const MatrixView& sum);

}  // namespace introkernels::cpu
