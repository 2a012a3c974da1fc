// The linear head and its loss, explained at the features: matrix products for a chunk of rows,
// then the row loss; logits and statistics of all rows never exist at once.
//
// Where the loss is reduced to a scalar, the gradient that comes in on the way back is one number,
// and gradients of features, weight and bias are made along with the loss, up to that factor: their
// rows' logits are at hand. Making them again for the backward would cost three more products.
#include <cmath>
#include <cstdint>

#include "cpu/linear_products.h"
#include "cpu/row_loop.h"
#include "cpu/similarity.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

namespace {

// The arguments that both operators share.
struct HeadCall {
  const Tensor& features;
  const Tensor& weight;
  const Indices& target;
  const std::optional<Tensor>& bias;
  bool center;
  const std::optional<Tensor>& class_weight;
  LossOptions options;
  LabelOptions labels;
};

struct Needs {
  bool features;
  bool weight;
  bool bias;

  bool any() const { return features || weight || bias; }
};

// In the dtype of the loss; empty where they are not needed.
struct Gradients {
  Tensor features;
  Tensor weight;
  Tensor bias;
};

// What the gradients of a row's terms are multiplied by.
struct RowFactors {
  double ce;
  double kl;
};

// Those of a loss whose incoming gradient is 1, or 1 in each row.
template <typename T>
RowFactors factors_of(const Indices& target, const RowLoss<T>& loss) {
  const LossOptions& options = loss.options();
  RowFactors factors{options.ce_weight, options.kl_weight};
  if (options.reduction != Reduction::kMean) return factors;
  double weight_sum = 0.0, num_live = 0.0;
  for (int64_t row = 0; row < target.size(0); ++row) {
    if (loss.ignores(target(row))) continue;
    weight_sum += loss.weight(target(row));
    num_live += 1.0;
  }
  return {factors.ce / total_weight(weight_sum), factors.kl / num_live};
}

// Rows of a chunk: three matrices of rows x classes stay small beside the caches, but so many rows
// share each number of the weight that products don't wait for memory.
int64_t chunk_rows(int64_t row_bytes) {
  constexpr int64_t kComfortable = 2 << 20, kMost = 64 << 20;
  constexpr int64_t kFewest = 16, kShared = 128;
  const int64_t comfortable = kComfortable / row_bytes, most = kMost / row_bytes;
  return std::clamp(std::max(comfortable, std::min(most, kShared)), kFewest, kBlockRows);
}

// Losses and gradients of all rows, chunk by chunk.
template <typename T>
class HeadPass {
 public:
  // grad_loss: one incoming gradient for each row, or null for ones.
  HeadPass(const HeadCall& call, const Needs& needs, const Input* grad_loss,
           LossCollector* collector)
      : call_(call),
        needs_(needs),
        grad_loss_(grad_loss),
        collector_(collector),
        features_(call.features, call.target, call.options.ignore_index),
        weight_(call.weight, call.center),
        bias_(call.bias),
        class_weight_(call.class_weight),
        loss_(call.options, class_weight_.data(), num_classes()),
        factors_(factors_of(call.target, loss_)) {}

  Gradients run() {
    const Gradients gradients = new_gradients();
    const int64_t stride = row_stride();
    const int64_t row_bytes = std::max<int64_t>(1, 3 * stride * int64_t(sizeof(T)));
    // Chunks of about the same size.
    const int64_t most = chunk_rows(row_bytes);
    const int64_t num_chunks = (num_rows() + most - 1) / most;
    const int64_t step = num_chunks == 0 ? 0 : (num_rows() + num_chunks - 1) / num_chunks;
    Tensor memory = new_empty({3 * step, stride}, dtype());
    const MatrixOf<T> all = matrix_of<T>(memory);
    const HeadRows<T> rows{all, {all.row(step), stride}, {all.row(2 * step), stride}};
    std::vector<double> grad_bias(static_cast<size_t>(needs_.bias ? num_classes() : 0));
    for (int64_t first = 0; first < num_rows(); first += step) {
      const int64_t count = std::min(step, num_rows() - first);
      multiply_forward(features_, weight_, first, count, rows);
      lose_rows(first, count, rows);
      const MatrixOf<T>& grad_logits = rows.logits;
      if (needs_.features) {
        const MatrixOf<T> out = matrix_of<T>(gradients.features);
        multiply_features_backward(grad_logits, count, weight_, {out.row(first), out.stride});
      }
      if (needs_.weight) {
        multiply_weight_backward(grad_logits, features_, first, count, num_classes(), first > 0,
                                 matrix_of<T>(gradients.weight));
      }
      if (needs_.bias) add_rows(grad_logits, count, &grad_bias);
    }
    if (needs_.bias) {
      T* const out = static_cast<T*>(gradients.bias.mutable_data_ptr());
      std::transform(grad_bias.begin(), grad_bias.end(), out, [](double sum) { return T(sum); });
    }
    return gradients;
  }

 private:
  int64_t num_rows() const { return features_.rows(); }
  int64_t num_classes() const { return weight_.classes(); }
  ScalarType dtype() const { return wide_dtype(call_.features); }

  // Of the matrices of a chunk: whole tiles, and a cache line, so that rows don't lie a power of
  // two apart and compete for the same places in a cache.
  int64_t row_stride() const {
    const int64_t columns = product_kernels<T>().columns;
    return (num_classes() + columns - 1) / columns * columns + 64 / int64_t(sizeof(T));
  }

  Gradients new_gradients() const {
    const auto empty_unless = [&](bool needed, std::initializer_list<int64_t> sizes) {
      return needed ? new_empty(sizes, dtype()) : new_empty({0}, dtype());
    };
    Gradients gradients{empty_unless(needs_.features, {num_rows(), features_.width()}),
                        empty_unless(needs_.weight, {num_classes(), features_.width()}),
                        empty_unless(needs_.bias, {num_classes()})};
    if (num_rows() == 0) torch::stable::zero_(gradients.weight);
    return gradients;
  }

  // The row loss: z, dots and sq_norms of a row to its terms, and to the gradient of its logits,
  // which takes the place of the logits.
  void lose_rows(int64_t first, int64_t count, const HeadRows<T>& rows) const {
    const int64_t num_classes = this->num_classes();
    torch::stable::parallel_for(0, count, row_grain(num_classes), [&](int64_t begin, int64_t end) {
      Buffer<T> teacher(num_classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = first + i, target = features_.target(row);
        T* const logits = rows.logits.row(i);
        if (features_.ignored(row)) {
          collector_->ignore(row);
          std::fill(logits, logits + num_classes, T(0));
          continue;
        }
        if (bias_.data() != nullptr) {
          for (int64_t c = 0; c < num_classes; ++c) logits[c] += bias_.data()[c];
        }
        const T* const dots = rows.dots.row(i);
        const T* const sq_norms = rows.sq_norms.row(i);
        teacher_logits_of_stats(dots, sq_norms, nullptr, num_classes, logits, num_classes, target,
                                call_.labels, teacher.get());
        RowState& state = collector_->state(row);
        const RowTerms terms =
            loss_.forward(logits, teacher.get(), target, Spread::kOneThread, &state);
        collector_->set(row, terms, loss_.weight(target));
        if (!needs_.any()) continue;
        const double incoming = grad_loss_ == nullptr ? 1.0 : grad_loss_->value(row);
        loss_.backward(logits, teacher.get(), target, state, incoming * factors_.ce,
                       incoming * factors_.kl, Spread::kOneThread, logits);
      }
    });
  }

  static void add_rows(const MatrixOf<T>& rows, int64_t count, std::vector<double>* sums) {
    const int64_t size = static_cast<int64_t>(sums->size());
    torch::stable::parallel_for(0, size, row_grain(count), [&](int64_t begin, int64_t end) {
      double* const out = sums->data();
      for (int64_t i = 0; i < count; ++i) {
        const T* const row = rows.row(i);
        for (int64_t c = begin; c < end; ++c) out[c] += static_cast<double>(row[c]);
      }
    });
  }

  const HeadCall& call_;
  Needs needs_;
  const Input* grad_loss_;
  LossCollector* collector_;
  HeadFeatures<T> features_;
  HeadWeight<T> weight_;
  OptionalValues<T> bias_;
  OptionalValues<T> class_weight_;
  RowLoss<T> loss_;
  RowFactors factors_;
};

Gradients run(const HeadCall& call, const Needs& needs, const Input* grad_loss,
              LossCollector* collector) {
  if (wide_dtype(call.features) == ScalarType::Double) {
    return HeadPass<double>(call, needs, grad_loss, collector).run();
  }
  return HeadPass<float>(call, needs, grad_loss, collector).run();
}

template <typename T>
void multiply_by(const Tensor& gradient, double factor) {
  T* const values = static_cast<T*>(gradient.mutable_data_ptr());
  torch::stable::parallel_for(0, gradient.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] *= static_cast<T>(factor);
  });
}

// A gradient for an incoming gradient of 1, times that of a reduced loss, in the dtype of the
// argument.
Tensor finished(const Tensor& gradient, const Input* factor, ScalarType dtype) {
  if (factor != nullptr && gradient.scalar_type() == ScalarType::Double) {
    multiply_by<double>(gradient, factor->value(0));
  } else if (factor != nullptr) {
    multiply_by<float>(gradient, factor->value(0));
  }
  return gradient.scalar_type() == dtype ? gradient : torch::stable::to(gradient, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(
    const Tensor& features, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, bool need_features, bool need_weight, bool need_bias,
    bool center, const std::optional<Tensor>& class_weight, double temperature, double ce_weight,
    double kl_weight, int64_t ignore_index, double label_smoothing, int64_t reduction,
    double similarity_temperature, int64_t similarity, int64_t label_mode, double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Indices y(target);
  check_targets(y, weight.size(0), ignore_index);
  LossCollector collector(features.size(0), wide_dtype(features), options);
  const Gradients gradients =
      run({features, weight, y, bias, center, class_weight, options, labels},
          {need_features, need_weight, need_bias}, nullptr, &collector);
  return std::tuple_cat(collector.finish(),
                        std::make_tuple(gradients.features, gradients.weight, gradients.bias));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_loss, const Tensor& features, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor&, const Tensor&, bool need_features,
    bool need_weight, bool center, const std::optional<Tensor>& class_weight, double temperature,
    double ce_weight, double kl_weight, int64_t ignore_index, double label_smoothing,
    int64_t reduction, double similarity_temperature, int64_t similarity, int64_t label_mode,
    double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Indices y(target);
  check_targets(y, weight.size(0), ignore_index);
  LossCollector collector(features.size(0), wide_dtype(features), options);
  const Input incoming(grad_loss);
  const bool per_row = options.reduction == Reduction::kNone;
  const Gradients gradients = run(
      {features, weight, y, bias, center, class_weight, options, labels},
      {need_features, need_weight, bias.has_value()}, per_row ? &incoming : nullptr, &collector);
  const Input* const factor = per_row ? nullptr : &incoming;
  return {finished(gradients.features, factor, features.scalar_type()),
          finished(gradients.weight, factor, weight.scalar_type()),
          finished(gradients.bias, factor, (bias ? *bias : features).scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("linear_forward", TORCH_BOX(&linear_forward));
  library.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace introkernels::cpu
