// The matrix products of a linear head, and what they multiply: features and weight, as they are
// and as they explain the logits.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/products.h"

namespace introkernels::cpu {

// A power of two in two factors, of which none overflows where the whole does.
template <typename T>
struct PowerOfTwo {
  T factors[2];

  // 2^exponent
  explicit PowerOfTwo(int exponent)
      : factors{T(std::ldexp(1.0, exponent / 2)), T(std::ldexp(1.0, exponent - exponent / 2))} {}
};

// The exponent e for which largest * 2^-e lies in [1/2, 1); 0 for 0, infinity and NaN. Similarities
// are ratios: scaling a row of features, or the whole weight, by a power of two changes nothing in
// them, but keeps squares in the range of float32.
int exponent_of(double largest);

// The rows of the features. Ignored ones read as zero: whatever they hold, even NaN, it would reach
// the gradient of the weight through the matrix product.
template <typename T>
class HeadFeatures {
 public:
  HeadFeatures(const Tensor& features, const Indices& target, int64_t ignore_index);

  int64_t rows() const { return features_.size(0); }
  int64_t width() const { return features_.size(1); }
  int64_t target(int64_t row) const { return target_(row); }
  bool ignored(int64_t row) const { return target_(row) == ignore_index_; }

  // Null in an ignored row, whose numbers are zeros.
  const T* read(int64_t row, int64_t begin, int64_t count, T* buffer) const {
    return ignored(row) ? nullptr : features_.read(row, begin, count, buffer);
  }
  // What brings a row near 1.
  const PowerOfTwo<T>& scale(int64_t row) const { return scales_[static_cast<size_t>(row)]; }

 private:
  Input features_;
  const Indices& target_;
  int64_t ignore_index_;
  std::vector<PowerOfTwo<T>> scales_;
};

// The weight, and the weight as it is explained: near 1, and centred where that is wanted.
template <typename T>
class HeadWeight {
 public:
  HeadWeight(const Tensor& weight, bool center);

  int64_t classes() const { return weight_.size(0); }
  int64_t width() const { return weight_.size(1); }
  const T* read(int64_t row, int64_t begin, int64_t count, T* buffer) const {
    return weight_.read(row, begin, count, buffer);
  }

  // Elements [begin, begin + count) of a row as it is explained, but for target_scale() where the
  // weight explains itself.
  const T* explained(int64_t row, int64_t begin, int64_t count, T* buffer) const;

  // Whether the weight is so near to 1, and not centred, that products may take it as explained:
  // the other side of such a product is multiplied by target_scale(), a power of two that makes up
  // for both sides.
  bool explains_itself() const { return explains_itself_; }
  T target_scale() const { return target_scale_; }
  // What explained numbers of explained() lack: 1 unless the weight explains itself.
  PowerOfTwo<T> missing_scale() const { return explains_itself_ ? scale_ : PowerOfTwo<T>(0); }

 private:
  Input weight_;
  std::vector<double> mean_;  // over the classes; empty where it is not wanted
  PowerOfTwo<T> scale_;
  T target_scale_;
  bool explains_itself_ = false;

  void set_mean();
  double largest() const;
};

// Logits and statistics of rows [first, first + count): with E_c = w_c * h, elementwise,
//
//   z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T.
//
// Rows of the outputs have `stride` numbers, a multiple of the kernels' columns.
template <typename T>
struct HeadRows {
  MatrixOf<T> logits;
  MatrixOf<T> dots;
  MatrixOf<T> sq_norms;
};
template <typename T>
void multiply_forward(const HeadFeatures<T>& features, const HeadWeight<T>& weight, int64_t first,
                      int64_t count, const HeadRows<T>& out);

// grad_features [count, width] = G W, for the gradients G [count, classes] of the logits.
template <typename T>
void multiply_features_backward(const MatrixOf<T>& grad_logits, int64_t count,
                                const HeadWeight<T>& weight, const MatrixOf<T>& grad_features);

// grad_weight [classes, width] = or += G^T h.
template <typename T>
void multiply_weight_backward(const MatrixOf<T>& grad_logits, const HeadFeatures<T>& features,
                              int64_t first, int64_t count, int64_t classes, bool accumulate,
                              const MatrixOf<T>& grad_weight);

}  // namespace introkernels::cpu
