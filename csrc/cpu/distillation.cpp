// Distillation from given teacher logits.
#include <limits>

#include "cpu/row_loop.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

namespace {

// The teacher logits of the call, as they are.
template <typename T>
class GivenTeacher {
 public:
  explicit GivenTeacher(const Input& teacher_logits) : teacher_logits_(teacher_logits) {}

  size_t bytes() const { return Workspace::bytes_of<T>(teacher_logits_.size(1)); }
  auto rows(Workspace* workspace) const {
    T* const scratch = workspace->take<T>(teacher_logits_.size(1));
    return [this, scratch](int64_t row, const T*, int64_t) {
      return teacher_logits_.row(row, scratch);
    };
  }

 private:
  const Input& teacher_logits_;
};

// A teacher that excludes every class is no distribution: as torch's softmax, NaN.
constexpr double kKlWithoutLabels = std::numeric_limits<double>::quiet_NaN();

}  // namespace

LossOutputs distillation_forward(const Tensor& logits, const Tensor& teacher_logits,
                                 const Tensor& target, const std::optional<Tensor>& weight,
                                 double temperature, double ce_weight, double kl_weight,
                                 int64_t ignore_index, double label_smoothing, int64_t reduction) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  LossCollector collector(z.size(0), wide_dtype(logits), options);
  in_precision_of(logits, [&]<typename T>(T) {
    const OptionalValues<T> class_weight(weight);
    const RowLoss<T> loss(options, class_weight.data(), z.size(1), kKlWithoutLabels);
    forward_rows(z, y, loss, GivenTeacher<T>(t), &collector);
  });
  return collector.finish();
}

Tensor distillation_backward(const Tensor& grad_loss, const Tensor& logits,
                             const Tensor& teacher_logits, const Tensor& target,
                             const Tensor& row_state, const Tensor& totals,
                             const std::optional<Tensor>& weight, double temperature,
                             double ce_weight, double kl_weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  Tensor grad_logits = new_empty({z.size(0), z.size(1)}, logits.scalar_type());
  in_precision_of(logits, [&]<typename T>(T) {
    const OptionalValues<T> class_weight(weight);
    const RowLoss<T> loss(options, class_weight.data(), z.size(1), kKlWithoutLabels);
    backward_rows(z, y, loss, states_of(row_state), LossScales(grad_loss, totals, options),
                  GivenTeacher<T>(t), Output(grad_logits));
  });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("distillation_forward", TORCH_BOX(&distillation_forward));
  library.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace introkernels::cpu
