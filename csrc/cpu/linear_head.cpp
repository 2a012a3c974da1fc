// The linear head and its loss, explained at the features. With E_c = w_c * h, elementwise,
//
//   z = h W^T,   dots = (h^2 * w_y) W^T,   sq_norms = h^2 (W^2)^T:
//
// three matrix products for a chunk of rows, then the row loss; logits and statistics of all rows
// never exist at once. The backward makes them again, chunk by chunk.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/similarity.h"
#include "cpu/matrix.h"
#include "cpu/row_loop.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

namespace {

// A contiguous copy of a matrix in a floating dtype.
Tensor copy_as(const Tensor& matrix, ScalarType dtype) {
  Tensor copy = new_empty(matrix, {matrix.size(0), matrix.size(1)}, dtype);
  const Input source(matrix);
  const Output destination(copy);
  const int64_t width = matrix.size(1);
  torch::stable::parallel_for(0, matrix.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<double> row_values(static_cast<size_t>(width));
    for (int64_t row = begin; row < end; ++row) {
      source.read(row, 0, width, row_values.data());
      destination.write(row, row_values.data());
    }
  });
  return copy;
}

// The matrix itself where it is contiguous, aligned and of the dtype, else a copy that is. BLAS
// rounds differently where data is not aligned as an allocation of its own is, and equal inputs
// shall give equal bits.
Tensor contiguous_as(const Tensor& matrix, ScalarType dtype) {
  constexpr uintptr_t kAlignment = 64;
  const bool is_one = matrix.scalar_type() == dtype && matrix.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % kAlignment == 0;
  return is_one ? matrix : copy_as(matrix, dtype);
}

// The exponent e for which largest * 2^-e lies in [1/2, 1); 0 for 0, infinity and NaN. Similarities
// are ratios: scaling a row of features, or the whole weight, by a power of two changes nothing in
// them, but keeps squares in the range of float32.
int exponent_of(double largest) {
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  return exponent;
}

// The features in the dtype of the products. Ignored rows are zero: whatever they hold, even NaN,
// it would reach the gradient of the weight through the matrix product.
Tensor live_features(const Tensor& features, ScalarType dtype, const Indices& target,
                     int64_t ignore_index) {
  Tensor rows = contiguous_as(features, dtype);
  bool is_copy = rows.const_data_ptr() != features.const_data_ptr();
  const std::vector<double> zeros(static_cast<size_t>(rows.size(1)));
  for (int64_t row = 0; row < rows.size(0); ++row) {
    if (target(row) != ignore_index) continue;
    if (!is_copy) rows = copy_as(features, dtype);
    is_copy = true;
    Output(rows).write(row, zeros.data());
  }
  return rows;
}

// The weight in the dtype of the products, as it is explained (centred or not, and near 1), and the
// squares of that.
struct ExplainedWeight {
  Tensor weight;
  Tensor explained;
  Tensor squared;

  ExplainedWeight(const Tensor& weight_in, ScalarType dtype, bool center)
      : weight(contiguous_as(weight_in, dtype)),
        explained(new_empty(weight, {weight.size(0), weight.size(1)}, dtype)),
        squared(new_empty(weight, {weight.size(0), weight.size(1)}, dtype)) {
    const int64_t num_classes = weight.size(0), width = weight.size(1);
    const Input source(weight);
    std::vector<double> mean(static_cast<size_t>(width)), row(static_cast<size_t>(width));
    if (center) {
      for (int64_t c = 0; c < num_classes; ++c) {
        source.read(c, 0, width, row.data());
        for (int64_t d = 0; d < width; ++d) mean[d] += row[d];
      }
      for (double& value : mean) value /= static_cast<double>(num_classes);
    }
    double largest = 0.0;
    for (int64_t c = 0; c < num_classes; ++c) {
      source.read(c, 0, width, row.data());
      for (int64_t d = 0; d < width; ++d) {
        largest = std::max(largest, std::abs(row[d] - mean[d]));
      }
    }
    const int exponent = exponent_of(largest);
    const Output explained_out(explained), squared_out(squared);
    torch::stable::parallel_for(0, num_classes, row_grain(width), [&](int64_t begin, int64_t end) {
      std::vector<double> values(static_cast<size_t>(width));
      for (int64_t c = begin; c < end; ++c) {
        source.read(c, 0, width, values.data());
        for (int64_t d = 0; d < width; ++d) values[d] = std::ldexp(values[d] - mean[d], -exponent);
        explained_out.write(c, values.data());
        for (double& value : values) value *= value;
        squared_out.write(c, values.data());
      }
    });
  }
};

// Everything about the call that does not depend on the chunk.
struct Head {
  Tensor features;
  ExplainedWeight weight;
  std::vector<double> bias;
  const Indices& target;
  int64_t ignore_index;
  LabelOptions labels;

  Head(const Tensor& features_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
       const Indices& target_in, int64_t ignore_index_in, bool center,
       const LabelOptions& labels_in)
      : features(live_features(features_in, wide_dtype(features_in), target_in, ignore_index_in)),
        weight(weight_in, wide_dtype(features_in), center),
        bias(values_of(bias_in)),
        target(target_in),
        ignore_index(ignore_index_in),
        labels(labels_in) {}

  int64_t num_rows() const { return features.size(0); }
  int64_t num_classes() const { return weight.weight.size(0); }
  int64_t width() const { return features.size(1); }

  // Rows of a chunk: as many as give BLAS tall matrices while the chunk's few B x C matrices stay
  // within some tens of megabytes.
  int64_t chunk_rows() const {
    constexpr int64_t kElements = 4 << 20;
    return std::clamp<int64_t>(kElements / num_classes() / 16 * 16, 16, 1024);
  }
};

// Logits and statistics of a chunk of rows.
class Chunk {
 public:
  Chunk(const Head& head, int64_t begin, int64_t count)
      : head_(head),
        begin_(begin),
        rows_(MatrixView::of(head.features).block(begin, count, 0, head.width())),
        logits_(new_matrix(count, head.num_classes())),
        dots_(new_matrix(count, head.num_classes())),
        sq_norms_(new_matrix(count, head.num_classes())),
        logits_in_(logits_),
        dots_in_(dots_),
        sq_norms_in_(sq_norms_) {
    Tensor sq_features = new_matrix(count, head.width());
    Tensor target_side = new_matrix(count, head.width());
    fill_factors(sq_features, target_side);
    multiply(rows_, head.weight.weight, logits_);
    multiply(MatrixView::of(target_side), head.weight.explained, dots_);
    multiply(MatrixView::of(sq_features), head.weight.squared, sq_norms_);
    add_bias();
  }

  const MatrixView& features() const { return rows_; }
  const Tensor& logits() const { return logits_; }

  // Reads the logits z of a row of the chunk and makes its teacher logits t.
  void read(int64_t row, double* z, double* t, double* scratch) const {
    const int64_t num_classes = head_.num_classes();
    logits_in_.read(row, 0, num_classes, z);
    dots_in_.read(row, 0, num_classes, scratch);
    sq_norms_in_.read(row, 0, num_classes, scratch + num_classes);
    teacher_logits_of_stats(scratch, scratch + num_classes, nullptr, num_classes, z, num_classes,
                            target(row), head_.labels, t);
  }

  int64_t target(int64_t row) const { return head_.target(begin_ + row); }
  bool ignored(int64_t row) const { return target(row) == head_.ignore_index; }

 private:
  Tensor new_matrix(int64_t rows, int64_t columns) const {
    return new_empty(head_.features, {rows, columns}, head_.features.scalar_type());
  }
  static void multiply(const MatrixView& a, const Tensor& weight, const Tensor& out) {
    matmul_into(a, MatrixView::of(weight).transposed(), MatrixView::of(out));
  }

  // h^2 for h near 1, and h^2 times the weight of the row's target; zeros in ignored rows.
  void fill_factors(const Tensor& sq_features, const Tensor& target_side) const {
    const int64_t width = head_.width();
    const Input features(head_.features), explained(head_.weight.explained);
    const Output sq_out(sq_features), side_out(target_side);
    torch::stable::parallel_for(0, rows_.rows, row_grain(width), [&](int64_t begin, int64_t end) {
      std::vector<double> values(static_cast<size_t>(width)), of_target(values.size());
      for (int64_t row = begin; row < end; ++row) {
        if (ignored(row)) {
          std::fill(values.begin(), values.end(), 0.0);
          of_target = values;
        } else {
          features.read(begin_ + row, 0, width, values.data());
          double largest = 0.0;
          for (const double value : values) largest = std::max(largest, std::abs(value));
          const int exponent = exponent_of(largest);
          explained.read(target(row), 0, width, of_target.data());
          for (int64_t d = 0; d < width; ++d) {
            const double scaled = std::ldexp(values[d], -exponent);
            values[d] = scaled * scaled;
            of_target[d] *= values[d];
          }
        }
        sq_out.write(row, values.data());
        side_out.write(row, of_target.data());
      }
    });
  }

  void add_bias() const {
    if (head_.bias.empty()) return;
    const int64_t num_classes = head_.num_classes();
    const Input source(logits_);
    const Output destination(logits_);
    torch::stable::parallel_for(0, rows_.rows, row_grain(num_classes),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<double> values(static_cast<size_t>(num_classes));
                                  for (int64_t row = begin; row < end; ++row) {
                                    source.read(row, 0, num_classes, values.data());
                                    for (int64_t c = 0; c < num_classes; ++c)
                                      values[c] += head_.bias[c];
                                    destination.write(row, values.data());
                                  }
                                });
  }

  const Head& head_;
  int64_t begin_;
  MatrixView rows_;
  Tensor logits_;
  Tensor dots_;
  Tensor sq_norms_;
  Input logits_in_;
  Input dots_in_;
  Input sq_norms_in_;
};

template <typename Work>
void for_each_chunk(const Head& head, const Work& work) {
  const int64_t step = head.chunk_rows();
  for (int64_t begin = 0; begin < head.num_rows(); begin += step) {
    const int64_t count = std::min(step, head.num_rows() - begin);
    work(begin, count, Chunk(head, begin, count));
  }
}

}  // namespace

LossOutputs linear_forward(const Tensor& features, const Tensor& weight, const Tensor& target,
                           const std::optional<Tensor>& bias, bool center,
                           const std::optional<Tensor>& class_weight, double temperature,
                           double ce_weight, double kl_weight, int64_t ignore_index,
                           double label_smoothing, int64_t reduction, double similarity_temperature,
                           int64_t similarity, int64_t label_mode, double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Indices y(target);
  check_targets(y, weight.size(0), ignore_index);
  const Head head(features, weight, bias, y, ignore_index, center, labels);
  const ScalarType dtype = head.features.scalar_type();
  const std::vector<double> class_weights = values_of(class_weight);
  const int64_t num_classes = head.num_classes();
  const RowLoss<double> loss(options, class_weight ? class_weights.data() : nullptr, num_classes);
  LossCollector collector(features, head.num_rows(), dtype, options);
  for_each_chunk(head, [&](int64_t first, int64_t count, const Chunk& chunk) {
    torch::stable::parallel_for(0, count, row_grain(num_classes), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(static_cast<size_t>(4 * num_classes));
      double* z = scratch.data();
      double* t = z + num_classes;
      for (int64_t row = begin; row < end; ++row) {
        if (chunk.ignored(row)) {
          collector.ignore(first + row);
          continue;
        }
        chunk.read(row, z, t, t + num_classes);
        const int64_t y_row = chunk.target(row);
        collector.set(first + row, loss.forward(z, t, y_row, &collector.state(first + row)),
                      loss.weight(y_row));
      }
    });
  });
  return collector.finish();
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_loss, const Tensor& features, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& row_state, const Tensor& totals,
    bool need_features, bool need_weight, bool center, const std::optional<Tensor>& class_weight,
    double temperature, double ce_weight, double kl_weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, double similarity_temperature, int64_t similarity,
    int64_t label_mode, double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Indices y(target);
  check_targets(y, weight.size(0), ignore_index);
  const Head head(features, weight, bias, y, ignore_index, center, labels);
  const ScalarType dtype = head.features.scalar_type();
  const std::vector<double> class_weights = values_of(class_weight);
  const int64_t num_classes = head.num_classes(), width = head.width();
  const RowLoss<double> loss(options, class_weight ? class_weights.data() : nullptr, num_classes);
  const RowState* states = states_of(row_state);
  const LossScales scales(grad_loss, totals, options);

  Tensor grad_features = new_empty(features, {need_features ? head.num_rows() : 0, width}, dtype);
  Tensor grad_weight = new_empty(weight, {need_weight ? num_classes : 0, width}, dtype);
  torch::stable::zero_(grad_weight);
  std::vector<double> grad_bias(static_cast<size_t>(num_classes));
  for_each_chunk(head, [&](int64_t first, int64_t count, const Chunk& chunk) {
    // The gradient of the logits takes the place of the logits themselves, row by row.
    const Output grad_logits_out(chunk.logits());
    torch::stable::parallel_for(0, count, row_grain(num_classes), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(static_cast<size_t>(5 * num_classes));
      double* z = scratch.data();
      double* t = z + num_classes;
      double* grad = t + num_classes;
      for (int64_t row = begin; row < end; ++row) {
        if (chunk.ignored(row)) {
          std::fill(grad, grad + num_classes, 0.0);
        } else {
          chunk.read(row, z, t, grad + num_classes);
          loss.backward(z, t, chunk.target(row), states[first + row], scales.ce(first + row),
                        scales.kl(first + row), grad);
        }
        grad_logits_out.write(row, grad);
      }
    });
    const MatrixView grad_logits = MatrixView::of(chunk.logits());
    if (need_features) {
      matmul_into(grad_logits, MatrixView::of(head.weight.weight),
                  MatrixView::of(grad_features).block(first, count, 0, width));
    }
    if (need_weight) {
      matmul_add_into(grad_logits.transposed(), chunk.features(), MatrixView::of(grad_weight));
    }
    if (bias.has_value()) {
      const Input rows(chunk.logits());
      std::vector<double> grad(static_cast<size_t>(num_classes));
      for (int64_t row = 0; row < count; ++row) {
        rows.read(row, 0, num_classes, grad.data());
        for (int64_t c = 0; c < num_classes; ++c) grad_bias[c] += grad[c];
      }
    }
  });

  const auto finish = [](const Tensor& gradient, bool needed, const Tensor& like) {
    if (!needed) return new_empty(like, {0}, like.scalar_type());
    return contiguous_as(gradient, like.scalar_type());
  };
  Tensor bias_out = new_empty(features, {0}, features.scalar_type());
  if (bias.has_value()) {
    bias_out = new_empty(*bias, {num_classes}, bias->scalar_type());
    const Output out(bias_out);
    for (int64_t c = 0; c < num_classes; ++c) out.write(c, &grad_bias[static_cast<size_t>(c)]);
  }
  return {finish(grad_features, need_features, features), finish(grad_weight, need_weight, weight),
          bias_out};
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("linear_forward", TORCH_BOX(&linear_forward));
  library.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace introkernels::cpu
