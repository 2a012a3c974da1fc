// The numbers that parametrise the losses, as the operators receive them.
#pragma once

#include <cstdint>
#include <vector>

namespace introkernels {

// The codes are those of introkernels/ops/schema.py.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class Similarity : int64_t { kCosine = 0, kProjection = 1 };

// Those of introkernels/options.py that kernels read, unpacked from its lists in their order.
struct Options {
  double temperature;
  double ce_weight;
  double kl_weight;
  double label_smoothing;
  double similarity_temperature;
  int64_t ignore_index;
  Reduction reduction;
  Similarity similarity;
  bool center;

  Options(const std::vector<double>& floats, const std::vector<int64_t>& ints)
      : temperature(floats.at(0)),
        ce_weight(floats.at(1)),
        kl_weight(floats.at(2)),
        label_smoothing(floats.at(3)),
        similarity_temperature(floats.at(4)),
        ignore_index(ints.at(0)),
        reduction(Reduction(ints.at(1))),
        similarity(Similarity(ints.at(2))),
        center(ints.at(3) != 0) {}
};

}  // namespace introkernels
