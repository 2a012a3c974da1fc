// The numbers that parametrise the losses, as the operators receive them.
#pragma once

#include <cstdint>

namespace introkernels {

// The codes are those of introkernels/ops/schema.py.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class Similarity : int64_t { kCosine = 0, kProjection = 1 };
enum class LabelMode : int64_t { kSoftmax = 0, kSplit = 1 };

struct LossOptions {
  double temperature;
  double ce_weight;
  double kl_weight;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;
};

struct LabelOptions {
  double temperature;  // T of the loss: split labels are made at it
  double similarity_temperature;
  Similarity similarity;
  LabelMode label_mode;
  double non_target_mass;
};

}  // namespace introkernels
