#include "cpu/statistics.h"

#include <algorithm>
#include <limits>

#include "cpu/validate.h"

namespace introkernels::cpu {

namespace {

// Elements of D that are worked on at a time: x and E_y of a slice stay in the L1 cache. With
// centering each gradient of a slice is read twice, so a slice of all classes has to fit into L2.
int64_t slice_of(int64_t num_explained, bool center) {
  constexpr int64_t kInL1 = 1024;
  constexpr int64_t kInL2 = 65536;
  if (!center) return kInL1;
  return std::clamp<int64_t>(kInL2 / std::max<int64_t>(1, num_explained), 64, kInL1);
}

struct Sums {
  double dot;
  double sq_norm;
};

// The order of the additions is fixed by kLanes alone, and lanes let the compiler vectorise them.
Sums inner_products(const double* gradient, const double* inputs, const double* target_explanation,
                    int64_t count) {
  constexpr int64_t kLanes = 8;
  double dots[kLanes] = {}, sq_norms[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double e = gradient[d + lane] * inputs[d + lane];
      dots[lane] += e * target_explanation[d + lane];
      sq_norms[lane] += e * e;
    }
  }
  for (int64_t lane = 0; d < count; ++d, ++lane) {
    const double e = gradient[d] * inputs[d];
    dots[lane] += e * target_explanation[d];
    sq_norms[lane] += e * e;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      dots[lane] += dots[lane + half];
      sq_norms[lane] += sq_norms[lane + half];
    }
  }
  return {dots[0], sq_norms[0]};
}

}  // namespace

RowStatistics::RowStatistics(const Input& gradients, const Input& inputs, bool center)
    : gradients_(gradients),
      inputs_(inputs),
      center_(center),
      num_explained_(gradients.size(1)),
      num_dims_(gradients.size(2)),
      slice_(slice_of(num_explained_, center)),
      gradient_(static_cast<size_t>(slice_)),
      mean_(center ? static_cast<size_t>(slice_) : 0),
      inputs_of_slice_(static_cast<size_t>(slice_)),
      target_explanation_(static_cast<size_t>(slice_)) {}

void RowStatistics::compute(int64_t row, int64_t target_position, double* dots, double* sq_norms) {
  std::fill(dots, dots + num_explained_, 0.0);
  std::fill(sq_norms, sq_norms + num_explained_, 0.0);
  for (int64_t begin = 0; begin < num_dims_; begin += slice_) {
    const int64_t count = std::min(slice_, num_dims_ - begin);
    if (center_) {
      std::fill(mean_.begin(), mean_.end(), 0.0);
      for (int64_t k = 0; k < num_explained_; ++k) {
        gradients_.read(row, k, begin, count, gradient_.data());
        for (int64_t d = 0; d < count; ++d) mean_[d] += gradient_[d];
      }
      for (int64_t d = 0; d < count; ++d) mean_[d] /= static_cast<double>(num_explained_);
    }
    const auto read_gradient = [&](int64_t k) {
      gradients_.read(row, k, begin, count, gradient_.data());
      if (!center_) return;
      for (int64_t d = 0; d < count; ++d) gradient_[d] -= mean_[d];
    };
    inputs_.read(row, begin, count, inputs_of_slice_.data());
    read_gradient(target_position);
    for (int64_t d = 0; d < count; ++d) {
      target_explanation_[d] = gradient_[d] * inputs_of_slice_[d];
    }
    for (int64_t k = 0; k < num_explained_; ++k) {
      read_gradient(k);
      const Sums sums = inner_products(gradient_.data(), inputs_of_slice_.data(),
                                       target_explanation_.data(), count);
      dots[k] += sums.dot;
      sq_norms[k] += sums.sq_norm;
    }
  }
}

int64_t position_of(int64_t target, const int64_t* class_index, int64_t num_explained) {
  if (class_index == nullptr) return target;
  return std::find(class_index, class_index + num_explained, target) - class_index;
}

std::tuple<Tensor, Tensor> explanation_stats(const Tensor& gradients, const Tensor& inputs,
                                             const Tensor& target,
                                             const std::optional<Tensor>& class_index, bool center,
                                             int64_t ignore_index) {
  const Input g(gradients), x(inputs);
  const Indices y(target);
  const int64_t num_rows = g.size(0), num_explained = g.size(1);
  std::optional<Indices> index;
  if (class_index.has_value()) {
    index.emplace(*class_index);
    constexpr int64_t kAnyClass = std::numeric_limits<int64_t>::max();
    check_targets(y, kAnyClass, ignore_index);
    check_class_index(*index, y, kAnyClass, ignore_index);
  } else {
    check_targets(y, num_explained, ignore_index);
  }
  const ScalarType dtype = wide_dtype(gradients);
  Tensor dots = new_empty(gradients, {num_rows, num_explained}, dtype);
  Tensor sq_norms = new_empty(gradients, {num_rows, num_explained}, dtype);
  const Output dots_out(dots), sq_norms_out(sq_norms);
  torch::stable::parallel_for(
      0, num_rows, row_grain(num_explained * g.size(2)), [&](int64_t begin, int64_t end) {
        RowStatistics statistics(g, x, center);
        std::vector<double> scratch(static_cast<size_t>(2 * num_explained));
        std::vector<int64_t> classes(index ? static_cast<size_t>(num_explained) : 0);
        double* row_dots = scratch.data();
        double* row_sq_norms = row_dots + num_explained;
        for (int64_t row = begin; row < end; ++row) {
          if (y(row) == ignore_index) {
            std::fill(scratch.begin(), scratch.end(), 0.0);
          } else {
            if (index) index->read(row, classes.data());
            const int64_t position =
                position_of(y(row), index ? classes.data() : nullptr, num_explained);
            statistics.compute(row, position, row_dots, row_sq_norms);
          }
          dots_out.write(row, row_dots);
          sq_norms_out.write(row, row_sq_norms);
        }
      });
  return {dots, sq_norms};
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("explanation_stats", TORCH_BOX(&explanation_stats));
}

}  // namespace introkernels::cpu
