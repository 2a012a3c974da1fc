// What operators that end in a row loss share.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/tensors.h"

namespace introkernels::cuda {

// loss, ce, kl ([B] or scalars), row_state [B, 9] and totals [2], as introkernels/ops/schema.py
// says.
using LossTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Rows without a teacher yet.
Rows rows_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
             const LossOptions& options, double kl_without_labels);

Statistics statistics_of(const Tensor& dots, const Tensor& sq_norms,
                         const std::optional<Tensor>& class_index, const LabelOptions& labels);

LossTensors new_losses(const Tensor& logits, Reduction reduction);
LossOutputs outputs_of(const LossTensors& tensors);

// The losses of rows whose teacher is there.
LossTensors forward(const Tensor& logits, const Rows& rows, cudaStream_t stream);

LossOptions options_of(double temperature, double ce_weight, double kl_weight, int64_t ignore_index,
                       double label_smoothing, int64_t reduction);
LabelOptions labels_of(double temperature, double similarity_temperature, int64_t similarity,
                       int64_t label_mode, double non_target_mass);

}  // namespace introkernels::cuda
