#include "cpu/linear_products.h"

#include <cmath>

namespace introkernels::cpu {

namespace {

// Rows of a matrix that read(n, k, count, buffer) finds, turned into one panel: its columns n.
// Columns past `width` are zeros.
template <typename T>
class TransposedPanel {
 public:
  TransposedPanel()
      : kernels_(product_kernels<T>()),
        buffer_((kernels_.columns + 1) * kDepth),
        rows_(static_cast<size_t>(kernels_.columns)) {
    std::fill(zeros(), zeros() + kDepth, T(0));
  }

  template <typename Read>
  void fill(int64_t width, int64_t count, T* out, int64_t out_stride, const Read& read) {
    for (int64_t n = 0; n < kernels_.columns; ++n) {
      const T* row = n < width ? read(n, buffer_.get() + n * kDepth) : nullptr;
      rows_[static_cast<size_t>(n)] = row == nullptr ? zeros() : row;
    }
    kernels_.transpose(rows_.data(), count, out, out_stride);
  }

 private:
  T* zeros() const { return buffer_.get() + kernels_.columns * kDepth; }

  const ProductKernels<T>& kernels_;
  Buffer<T> buffer_;
  std::vector<const T*> rows_;
};

}  // namespace

int exponent_of(double largest) {
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  return exponent;
}

template <typename T>
HeadFeatures<T>::HeadFeatures(const Tensor& features, const Indices& target, int64_t ignore_index)
    : features_(features),
      target_(target),
      ignore_index_(ignore_index),
      scales_(static_cast<size_t>(features_.size(0)), PowerOfTwo<T>(0)) {
  torch::stable::parallel_for(0, rows(), row_grain(width()), [&](int64_t begin, int64_t end) {
    const Buffer<T> buffer(width());
    for (int64_t row = begin; row < end; ++row) {
      const T* const values = read(row, 0, width(), buffer.get());
      if (values == nullptr) continue;
      const double largest = product_kernels<T>().largest(values, width());
      scales_[static_cast<size_t>(row)] = PowerOfTwo<T>(-exponent_of(largest));
    }
  });
}

template <typename T>
HeadWeight<T>::HeadWeight(const Tensor& weight, bool center)
    : weight_(weight), scale_(0), target_scale_(1) {
  if (center) set_mean();
  const int exponent = exponent_of(largest());
  scale_ = PowerOfTwo<T>(-exponent);
  // target_scale is up to 2^64 then, which leaves the other half of float32's exponents to classes
  // much smaller than the largest one.
  constexpr int kNear = 32;
  explains_itself_ = !center && std::abs(exponent) <= kNear;
  if (explains_itself_) target_scale_ = T(std::ldexp(1.0, -2 * exponent));
}

template <typename T>
void HeadWeight<T>::set_mean() {
  mean_.resize(static_cast<size_t>(width()));
  constexpr int64_t kColumns = 64;
  const int64_t num_blocks = (width() + kColumns - 1) / kColumns;
  torch::stable::parallel_for(
      0, num_blocks, row_grain(kColumns * classes()), [&](int64_t begin, int64_t end) {
        T buffer[kColumns];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kColumns, count = std::min(kColumns, width() - first);
          double* const sums = mean_.data() + first;
          for (int64_t c = 0; c < classes(); ++c) {
            const T* const values = read(c, first, count, buffer);
            for (int64_t d = 0; d < count; ++d) sums[d] += static_cast<double>(values[d]);
          }
          for (int64_t d = 0; d < count; ++d) sums[d] /= static_cast<double>(classes());
        }
      });
}

template <typename T>
double HeadWeight<T>::largest() const {
  std::vector<double> of_row(static_cast<size_t>(classes()));
  torch::stable::parallel_for(0, classes(), row_grain(width()), [&](int64_t begin, int64_t end) {
    const Buffer<T> buffer(width());
    for (int64_t c = begin; c < end; ++c) {
      const T* const values = mean_.empty() ? read(c, 0, width(), buffer.get())
                                            : explained(c, 0, width(), buffer.get());
      of_row[static_cast<size_t>(c)] = product_kernels<T>().largest(values, width());
    }
  });
  return of_row.empty() ? 0.0 : *std::max_element(of_row.begin(), of_row.end());
}

template <typename T>
const T* HeadWeight<T>::explained(int64_t row, int64_t begin, int64_t count, T* buffer) const {
  const T* const values = read(row, begin, count, buffer);
  if (explains_itself_) return values;
  const T first = scale_.factors[0], second = scale_.factors[1];
  if (mean_.empty()) {
    for (int64_t d = 0; d < count; ++d) buffer[d] = values[d] * first * second;
    return buffer;
  }
  const double* const mean = mean_.data() + begin;
  for (int64_t d = 0; d < count; ++d) {
    buffer[d] = static_cast<T>(static_cast<double>(values[d]) - mean[d]) * first * second;
  }
  return buffer;
}

namespace {

// The operands of the three products of the forward: h, h^2 and h^2 * w_y on the left side; W, its
// square and, where W is not explained as it is, the explained weight on the right side.
template <typename T>
class ForwardOperands {
 public:
  enum Left { kFeatures, kSquares, kWeighted, kNumLeft };
  enum Right { kWeight, kSquaredWeight, kExplained };

  ForwardOperands(const HeadFeatures<T>& features, const HeadWeight<T>& weight, int64_t first)
      : features_(features), weight_(weight), first_(first), buffer_(2 * kDepth) {}

  static int num_right(const HeadWeight<T>& weight) {
    return weight.explains_itself() ? kExplained : kExplained + 1;
  }

  void fill_left(int64_t row, int64_t height, int64_t k, int64_t count, T* a) const {
    for (int64_t i = 0; i < height; ++i) {
      T* const values = a + i * kRowStride;
      T* const squares = values + kSquares * kBlockSize;
      T* const weighted = values + kWeighted * kBlockSize;
      const int64_t index = first_ + row + i;
      const T* const h = features_.read(index, k, count, buffer_.get());
      if (h == nullptr) {
        for (T* zeros : {values, squares, weighted}) std::fill(zeros, zeros + count, T(0));
        continue;
      }
      const T* const of_target =
          weight_.explained(features_.target(index), k, count, buffer_.get() + kDepth);
      std::copy(h, h + count, values);
      kernels_.square_and_weigh(h, of_target, count, features_.scale(index).factors,
                                weight_.target_scale(), squares, weighted);
    }
  }

  // A single panel of each operand.
  void fill_right(int64_t column, int64_t width, int64_t k, int64_t count, T* b) {
    const int64_t panel_size = kernels_.columns * kDepth;
    panel_.fill(width, count, b, kernels_.columns,
                [&](int64_t n, T* buffer) { return weight_.read(column + n, k, count, buffer); });
    const T* explained = b;
    if (!weight_.explains_itself()) {
      T* const out = b + kExplained * panel_size;
      panel_.fill(width, count, out, kernels_.columns, [&](int64_t n, T* buffer) {
        return weight_.explained(column + n, k, count, buffer);
      });
      explained = out;
    }
    kernels_.square(explained, count * kernels_.columns, weight_.missing_scale().factors,
                    b + kSquaredWeight * panel_size);
  }

 private:
  const ProductKernels<T>& kernels_ = product_kernels<T>();
  const HeadFeatures<T>& features_;
  const HeadWeight<T>& weight_;
  int64_t first_;
  Buffer<T> buffer_;
  TransposedPanel<T> panel_;
};

}  // namespace

template <typename T>
void multiply_forward(const HeadFeatures<T>& features, const HeadWeight<T>& weight, int64_t first,
                      int64_t count, const HeadRows<T>& out) {
  using Operands = ForwardOperands<T>;
  const int64_t classes = weight.classes(), depth = weight.width();
  const int explained = weight.explains_itself() ? Operands::kWeight : Operands::kExplained;
  const std::vector<Product<T>> products{
      {Operands::kFeatures, Operands::kWeight, out.logits},
      {Operands::kWeighted, explained, out.dots},
      {Operands::kSquares, Operands::kSquaredWeight, out.sq_norms}};
  for_each_rectangle(count, classes, product_kernels<T>().columns, 3 * count * classes * depth,
                     [&](const Rectangle& rectangle) {
                       Operands operands(features, weight, first);
                       multiply_rectangle(
                           rectangle, depth, false, Operands::kNumLeft, Operands::num_right(weight),
                           1, products,
                           [&](auto... arguments) { operands.fill_left(arguments...); },
                           [&](auto... arguments) { operands.fill_right(arguments...); });
                     });
}

// Panels side by side, so that rows of b are read in long stretches: 1 KiB with 512-bit registers.
constexpr int64_t kGroupPanels = 8;

template <typename T>
void multiply_features_backward(const MatrixOf<T>& grad_logits, int64_t count,
                                const HeadWeight<T>& weight, const MatrixOf<T>& grad_features) {
  const int64_t classes = weight.classes(), width = weight.width();
  const std::vector<Product<T>> products{{0, 0, grad_features}};
  for_each_rectangle(count, width, product_kernels<T>().columns, count * classes * width,
                     [&](const Rectangle& rectangle) {
                       const auto fill_grad = [&](int64_t row, int64_t height, int64_t k,
                                                  int64_t length, T* a) {
                         for (int64_t i = 0; i < height; ++i) {
                           const T* const grad = grad_logits.row(row + i) + k;
                           std::copy(grad, grad + length, a + i * kRowStride);
                         }
                       };
                       const auto fill_weight = [&](int64_t column, int64_t columns, int64_t k,
                                                    int64_t length, T* b) {
                         fill_panels(columns, length, b, [&](int64_t i, T* buffer) {
                           return weight.read(k + i, column, columns, buffer);
                         });
                       };
                       multiply_rectangle(rectangle, classes, false, 1, 1, kGroupPanels, products,
                                          fill_grad, fill_weight);
                     });
}

template <typename T>
void multiply_weight_backward(const MatrixOf<T>& grad_logits, const HeadFeatures<T>& features,
                              int64_t first, int64_t count, int64_t classes, bool accumulate,
                              const MatrixOf<T>& grad_weight) {
  const int64_t width = features.width(), columns = product_kernels<T>().columns;
  const std::vector<Product<T>> products{{0, 0, grad_weight}};
  for_each_rectangle(
      classes, width, columns, count * classes * width, [&](const Rectangle& rectangle) {
        TransposedPanel<T> block;
        const std::vector<T> zeros(static_cast<size_t>(kGroupPanels * columns));
        const auto fill_grad = [&](int64_t row, int64_t height, int64_t k, int64_t length, T* a) {
          for (int64_t i = 0; i < length; i += columns) {
            block.fill(std::min(columns, length - i), height, a + i, kRowStride,
                       [&](int64_t n, T*) { return grad_logits.row(k + i + n) + row; });
          }
        };
        const auto fill_features = [&](int64_t column, int64_t group_width, int64_t k,
                                       int64_t length, T* b) {
          fill_panels(group_width, length, b, [&](int64_t i, T* buffer) {
            const T* const row = features.read(first + k + i, column, group_width, buffer);
            return row == nullptr ? zeros.data() : row;
          });
        };
        multiply_rectangle(rectangle, count, accumulate, 1, 1, kGroupPanels, products, fill_grad,
                           fill_features);
      });
}

#define INTROKERNELS_INSTANTIATE(T)                                                              \
  template class HeadFeatures<T>;                                                                \
  template class HeadWeight<T>;                                                                  \
  template void multiply_forward(const HeadFeatures<T>&, const HeadWeight<T>&, int64_t, int64_t, \
                                 const HeadRows<T>&);                                            \
  template void multiply_features_backward(const MatrixOf<T>&, int64_t, const HeadWeight<T>&,    \
                                           const MatrixOf<T>&);                                  \
  template void multiply_weight_backward(const MatrixOf<T>&, const HeadFeatures<T>&, int64_t,    \
                                         int64_t, int64_t, bool, const MatrixOf<T>&);
INTROKERNELS_INSTANTIATE(float)
INTROKERNELS_INSTANTIATE(double)
#undef INTROKERNELS_INSTANTIATE

}  // namespace introkernels::cpu
