#include "cpu/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <stdexcept>

namespace introkernels::cpu {

namespace {

template <typename Source, typename T>
void gather(const void* source, int64_t stride, int64_t count, T* out) {
  const Source* const values = static_cast<const Source*>(source);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i * stride]);
}

// Sizes and strides of up to two dimensions.
void copy_shape(const Tensor& tensor, std::array<int64_t, 2>* sizes,
                std::array<int64_t, 2>* strides) {
  const auto all_sizes = tensor.sizes();
  const auto all_strides = tensor.strides();
  std::copy(all_sizes.begin(), all_sizes.end(), sizes->begin());
  std::copy(all_strides.begin(), all_strides.end(), strides->begin());
}

// A large allocation is fresh memory each time, and taking it page by page costs a loss as much as
// its arithmetic; by huge pages it costs a fraction. Where the system hands them out to those who
// ask, as most do, this asks; it does nothing elsewhere.
void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr uintptr_t kWorthIt = 8 * kHugePage;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const auto bytes = static_cast<uintptr_t>(tensor.numel() * item_size(tensor.scalar_type()));
  if (bytes < kWorthIt) return;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Number number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Number::kFloat64;
    case ScalarType::Float:
      return Number::kFloat32;
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    case ScalarType::Half:
      return Number::kFloat16;
    default:
      throw std::invalid_argument(
          "introkernels: a tensor must be float64, float32, bfloat16 or float16");
  }
}

int64_t item_size(ScalarType dtype) {
  switch (number_of(dtype)) {
    case Number::kFloat64:
      return 8;
    case Number::kFloat32:
      return 4;
    default:
      return 2;
  }
}

template <typename T>
void load_numbers(Number number, const void* source, int64_t stride, int64_t count, T* out) {
  if (stride == 1) {
    kernels().of<T>().load[int(number)](source, count, out);
    return;
  }
  switch (number) {
    case Number::kFloat64:
      return gather<double>(source, stride, count, out);
    case Number::kFloat32:
      return gather<float>(source, stride, count, out);
    case Number::kBFloat16:
      return gather<torch::headeronly::BFloat16>(source, stride, count, out);
    case Number::kFloat16:
      return gather<torch::headeronly::Half>(source, stride, count, out);
  }
}

template void load_numbers(Number, const void*, int64_t, int64_t, float*);
template void load_numbers(Number, const void*, int64_t, int64_t, double*);

Input::Input(const Tensor& tensor)
    : data_(static_cast<const char*>(tensor.const_data_ptr())),
      number_(number_of(tensor.scalar_type())),
      item_size_(item_size(tensor.scalar_type())) {
  copy_shape(tensor, &sizes_, &strides_);
}

Output::Output(const Tensor& tensor)
    : data_(static_cast<char*>(tensor.mutable_data_ptr())),
      number_(number_of(tensor.scalar_type())),
      item_size_(item_size(tensor.scalar_type())),
      row_size_(tensor.size(1)) {}

namespace {

IndexView view_of(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Long) {
    throw std::invalid_argument("introkernels: an index tensor must be int64");
  }
  std::array<int64_t, 2> sizes{}, strides{};
  copy_shape(tensor, &sizes, &strides);
  return {static_cast<const int64_t*>(tensor.const_data_ptr()), sizes, strides};
}

}  // namespace

Indices::Indices(const Tensor& tensor) : IndexView(view_of(tensor)) {}

ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  AtenTensorHandle handle = nullptr;
  // Half the time of torch::stable::new_empty, which goes through the dispatcher.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise_huge_pages(tensor);
  return tensor;
}

int64_t row_grain(int64_t elements_per_row) {
  // Some 20 microseconds of work: below that a thread costs more than it brings.
  constexpr int64_t kElementsPerTask = 16384;
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
}

}  // namespace introkernels::cpu
