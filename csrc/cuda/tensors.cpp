#include "cuda/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/validate.h"

namespace introkernels::cuda {

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("introkernels: ") + what + ": " + cudaGetErrorString(error));
}

// Index values as a host array: those from the first to the last one, in the tensor's own strides.
class HostIndices {
 public:
  HostIndices(const Tensor& tensor, cudaStream_t stream) {
    int64_t span = tensor.numel() > 0 ? 1 : 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      sizes_[size_t(dim)] = tensor.size(dim);
      strides_[size_t(dim)] = tensor.stride(dim);
      if (span > 0) span += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    values_.resize(size_t(span));
    const size_t bytes = values_.size() * sizeof(int64_t);
    check(cudaMemcpyAsync(values_.data(), tensor.const_data_ptr(), bytes, cudaMemcpyDeviceToHost,
                          stream),
          "reading index values");
    check(cudaStreamSynchronize(stream), "reading index values");
  }

  IndexView view() const { return {values_.data(), sizes_, strides_}; }

 private:
  std::vector<int64_t> values_;
  std::array<int64_t, 2> sizes_{1, 1};
  std::array<int64_t, 2> strides_{1, 1};
};

bool indices_are_checked() {
  const char* const value = std::getenv("INTROKERNELS_CHECK");
#if defined(INTROKERNELS_EMULATION)
  // Tensors of a CPU always are, unless a test asks for what a GPU does.
  return value == nullptr || std::string_view(value) != "0";
#else
  return value != nullptr && std::string_view(value) == "1";
#endif
}

Tensor allocate(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  // Half the time of torch::stable::new_empty, which goes through the dispatcher.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                  device_type, device_index, &handle));
  Tensor tensor(handle);
#if defined(INTROKERNELS_EMULATION)
  // What is read before it is written shows: to floating types this is NaN.
  const size_t bytes = size_t(tensor.numel()) * tensor.element_size();
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xFF, bytes);
#endif
  return tensor;
}

}  // namespace

NumberType type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return NumberType::kFloat64;
    case ScalarType::Float:
      return NumberType::kFloat32;
    case ScalarType::BFloat16:
      return NumberType::kBFloat16;
    case ScalarType::Half:
      return NumberType::kFloat16;
    default:
      throw std::invalid_argument(
          "introkernels: a tensor must be float64, float32, bfloat16 or float16");
  }
}

Matrix matrix_of(const Tensor& tensor) {
  Matrix matrix{tensor.const_data_ptr(), 0, 0, type_of(tensor)};
  const int64_t dims = tensor.dim();
  if (dims > 1) matrix.row_stride = tensor.stride(dims - 2);
  if (dims > 0) {
    // Of a single column, any stride will do; 1 lets vectors be loaded.
    matrix.column_stride = tensor.size(dims - 1) > 1 ? tensor.stride(dims - 1) : 1;
  }
  return matrix;
}

IndexMatrix indices_of(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Long) {
    throw std::invalid_argument("introkernels: an index tensor must be int64");
  }
  IndexMatrix indices{static_cast<const int64_t*>(tensor.const_data_ptr()), tensor.stride(0), 0};
  if (tensor.dim() > 1) indices.column_stride = tensor.stride(1);
  return indices;
}

ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  return allocate(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), dtype);
}

Tensor new_memory(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  return allocate(like, 1, &bytes, &stride, ScalarType::Byte);
}

Tensor new_zeros(const Tensor& like, int64_t bytes, cudaStream_t stream) {
  Tensor memory = new_memory(like, bytes);
  // Of nothing, the address may be null.
  if (bytes == 0) return memory;
  check(cudaMemsetAsync(memory.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream),
        "zeros for counters");
  return memory;
}

#if defined(INTROKERNELS_EMULATION)
OnDeviceOf::OnDeviceOf(const Tensor&) {}
#else
OnDeviceOf::OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}
#endif

void check_indices(const Tensor& target, const std::optional<Tensor>& class_index,
                   int64_t num_classes, int64_t ignore_index, cudaStream_t stream) {
  if (!indices_are_checked()) return;
  const HostIndices targets(target, stream);
  check_targets(targets.view(), num_classes, ignore_index);
  if (class_index.has_value()) {
    check_class_index(HostIndices(*class_index, stream).view(), targets.view(), num_classes,
                      ignore_index);
  }
}

}  // namespace introkernels::cuda
