// The linear head and its loss, explained at the features: matrix products for a chunk of rows,
// then the row loss; logits and statistics of all rows never exist at once.
//
// Where the loss is reduced to a scalar, the gradient that comes in on the way back is one number,
// and gradients of features, weight and bias are made along with the loss, up to that factor: their
// rows' logits are at hand. Making them again for the backward would cost three more products.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/linear_products.h"
#include "cpu/row_loss.h"

namespace introkernels::cpu {

namespace {

// The arguments of the operator.
struct HeadCall {
  const Tensor& features;
  const Tensor& weight;
  const Indices& target;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& class_weight;
  const std::optional<Tensor>& grad_loss;
  Options options;
  bool need_features;
  bool need_weight;
  bool need_bias;
};

// loss, ce, kl, grad_features, grad_weight, grad_bias.
using HeadOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
  explicit HeadPass(const HeadCall& call)
      : call_(call),
        features_(call.features, call.target, call.options.ignore_index),
        weight_(call.weight, call.options.center),
        bias_(call.bias),
        loss_(call.options, call.class_weight, call.target, num_classes()),
        collector_(loss_),
        scales_(is_reduced() ? std::nullopt : call.grad_loss, collector_.state(), call.options),
        grad_features_(new_gradient(call.need_features, {num_rows(), features_.width()})),
        grad_weight_(new_gradient(call.need_weight, {num_classes(), features_.width()})),
        grad_bias_(new_gradient(call.need_bias, {num_classes()})) {}

  HeadOutputs run() {
    const int64_t stride = row_stride();
    const int64_t row_bytes = std::max<int64_t>(1, 3 * stride * int64_t(sizeof(T)));
    // Chunks of about the same size.
    const int64_t most = chunk_rows(row_bytes);
    const int64_t num_chunks = (num_rows() + most - 1) / most;
    const int64_t step = num_chunks == 0 ? 0 : (num_rows() + num_chunks - 1) / num_chunks;
    Tensor memory = new_empty({3 * step, stride}, dtype_of<T>());
    const MatrixOf<T> all = matrix_of<T>(memory);
    const HeadRows<T> rows{all, {all.row(step), stride}, {all.row(2 * step), stride}};
    std::vector<double> grad_bias(static_cast<size_t>(call_.need_bias ? num_classes() : 0));
    if (num_rows() == 0) torch::stable::zero_(grad_weight_);
    for (int64_t first = 0; first < num_rows(); first += step) {
      const int64_t count = std::min(step, num_rows() - first);
      multiply_forward(features_, weight_, first, count, rows);
      lose_rows(first, count, rows);
      const MatrixOf<T>& grad_logits = rows.logits;
      if (call_.need_features) {
        const MatrixOf<T> out = matrix_of<T>(grad_features_);
        multiply_features_backward(grad_logits, count, weight_, {out.row(first), out.stride});
      }
      if (call_.need_weight) {
        multiply_weight_backward(grad_logits, features_, first, count, num_classes(), first > 0,
                                 matrix_of<T>(grad_weight_));
      }
      if (call_.need_bias) add_rows(grad_logits, count, &grad_bias);
    }
    std::transform(grad_bias.begin(), grad_bias.end(),
                   static_cast<T*>(grad_bias_.mutable_data_ptr()),
                   [](double sum) { return static_cast<T>(sum); });
    if (is_reduced() && call_.grad_loss) {
      const T factor = static_cast<T>(Input(*call_.grad_loss).value(0));
      for (const Tensor& gradient : {grad_features_, grad_weight_, grad_bias_}) {
        multiply_by(factor, gradient);
      }
    }
    const auto [loss, ce, kl, state] = collector_.finish();
    return {loss, ce, kl, grad_features_, grad_weight_, grad_bias_};
  }

 private:
  int64_t num_rows() const { return features_.rows(); }
  int64_t num_classes() const { return weight_.classes(); }
  bool is_reduced() const { return call_.options.reduction != Reduction::kNone; }

  // Of the matrices of a chunk: whole tiles, and a cache line, so that rows don't lie a power of
  // two apart and compete for the same places in a cache.
  int64_t row_stride() const {
    const int64_t columns = product_kernels<T>().columns;
    return (num_classes() + columns - 1) / columns * columns + 64 / int64_t(sizeof(T));
  }

  static Tensor new_gradient(bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? new_empty(sizes, dtype_of<T>()) : new_empty({0}, dtype_of<T>());
  }

  // The row loss: z, dots and sq_norms of a row to its terms, and to the gradient of its logits,
  // which takes the place of the logits.
  void lose_rows(int64_t first, int64_t count, const HeadRows<T>& rows) {
    const int64_t num_classes = this->num_classes();
    const bool need_gradient = call_.need_features || call_.need_weight || call_.need_bias;
    torch::stable::parallel_for(0, count, row_grain(num_classes), [&](int64_t begin, int64_t end) {
      const Buffer<T> teacher(num_classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = first + i;
        T* const logits = rows.logits.row(i);
        if (loss_.ignores(row)) {
          std::fill(logits, logits + num_classes, T(0));
          continue;
        }
        if (bias_.data() != nullptr) {
          for (int64_t c = 0; c < num_classes; ++c) logits[c] += bias_.data()[c];
        }
        kernels().of<T>().teacher_logits(rows.dots.row(i), rows.sq_norms.row(i), num_classes,
                                         features_.target(row), call_.options, teacher.get());
        collector_.forward(row, logits, teacher.get(), Spread::kOneThread);
        if (!need_gradient) continue;
        loss_.backward(row, logits, teacher.get(), sums_of(collector_.state())[row], scales_,
                       Spread::kOneThread, logits);
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

  static void multiply_by(T factor, const Tensor& gradient) {
    T* const values = static_cast<T*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, gradient.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] *= factor;
    });
  }

  const HeadCall& call_;
  HeadFeatures<T> features_;
  HeadWeight<T> weight_;
  OptionalValues<T> bias_;
  RowLoss<T> loss_;
  LossCollector<T> collector_;
  LossScales scales_;
  // For an incoming gradient of 1 where the loss is reduced, until the end.
  Tensor grad_features_;
  Tensor grad_weight_;
  Tensor grad_bias_;
};

}  // namespace

HeadOutputs linear(const Tensor& features, const Tensor& weight, const Tensor& target,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
                   const std::optional<Tensor>& grad_loss, const std::vector<double>& floats,
                   const std::vector<int64_t>& ints) {
  const Options options(floats, ints);
  const Indices y(target);
  check_targets(y, weight.size(0), options.ignore_index);
  require_kernels();
  const HeadCall call{features,        weight,         y,       bias,
                      class_weight,    grad_loss,      options, ints.at(4) != 0,
                      ints.at(5) != 0, ints.at(6) != 0};
  return in_precision_of(features, [&]<typename T>(T) { return HeadPass<T>(call).run(); });
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
}

}  // namespace introkernels::cpu
