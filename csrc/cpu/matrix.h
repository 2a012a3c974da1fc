// Matrix products of PyTorch's own BLAS, arranged so that their bits don't depend on the number of
// threads.
#pragma once

#include "cpu/tensors.h"

namespace introkernels::cpu {

// Switches gradient recording off in the calling thread while it lives: kernels run below autograd.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool previous_;
};

// out [M, N] = a [M, K] @ b [K, N], all of one dtype, any strides.
void matmul_into(const Tensor& a, const Tensor& b, Tensor& out);

// sum [M, N] += a [M, K] @ b [K, N], sum contiguous.
void matmul_add_into(const Tensor& a, const Tensor& b, Tensor& sum);

}  // namespace introkernels::cpu
