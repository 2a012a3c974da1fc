// Tensors as kernels take them, memory for what kernels write, and where they run.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "cuda/calls.h"

namespace introkernels::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument (ValueError in Python) for a dtype that is not floating.
NumberType type_of(const Tensor& tensor);

// A floating tensor of up to two dimensions; one of fewer is a row.
Matrix matrix_of(const Tensor& tensor);

// [B] or [B, K]; throws std::invalid_argument for a dtype other than int64.
IndexMatrix indices_of(const Tensor& tensor);

// float64 for float64, float32 for everything else: the dtype of losses and statistics.
ScalarType wide_dtype(const Tensor& tensor);

// An uninitialised contiguous tensor of up to two dimensions, where `like` lies.
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Uninitialised memory where `like` lies, freed with the tensor.
Tensor new_memory(const Tensor& like, int64_t bytes);

template <typename T = void>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// While this lives, the current device is that of a tensor.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);

  // The current stream of the device.
  cudaStream_t stream() const { return stream_; }

 private:
#if !defined(INTROKERNELS_EMULATION)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Memory of a launch's counters and the like, which starts as zeros.
Tensor new_zeros(const Tensor& like, int64_t bytes, cudaStream_t stream);

// Raises for index values out of range where they are looked at: in the emulation, and under
// INTROKERNELS_CHECK=1, which waits for the GPU. num_classes: of the target and the class index.
void check_indices(const Tensor& target, const std::optional<Tensor>& class_index,
                   int64_t num_classes, int64_t ignore_index, cudaStream_t stream);

}  // namespace introkernels::cuda
