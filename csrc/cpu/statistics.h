// Statistics of explanations: dots_c = <E_c, E_y> and sq_norms_c = <E_c, E_c> with E_c = g_c * x.
#pragma once

#include <vector>

#include "cpu/tensors.h"

namespace introkernels::cpu {

// Computes one row at a time; each thread has its own.
class RowStatistics {
 public:
  // gradients [B, K, D], inputs [B, D].
  RowStatistics(const Input& gradients, const Input& inputs, bool center);

  // dots, sq_norms: [K]. target_position: where the row's target stands among its K classes.
  void compute(int64_t row, int64_t target_position, double* dots, double* sq_norms);

 private:
  const Input& gradients_;
  const Input& inputs_;
  bool center_;
  int64_t num_explained_;
  int64_t num_dims_;
  int64_t slice_;
  std::vector<double> gradient_;            // g_c of the slice
  std::vector<double> mean_;                // the mean gradient of the slice
  std::vector<double> inputs_of_slice_;     // x
  std::vector<double> target_explanation_;  // E_y
};

// Where the target stands among the explained classes of its row; class_index has been checked.
int64_t position_of(int64_t target, const int64_t* class_index, int64_t num_explained);

}  // namespace introkernels::cpu
