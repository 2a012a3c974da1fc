// Statistics of explanations: dots_c = <E_c, E_y> and sq_norms_c = <E_c, E_c> with E_c = g_c * x.
//
// Rows are cut into segments of their dimensions, and where there are few of them also into blocks
// of classes. The segments depend on the shape alone, and their sums are added in the order of the
// dimensions, so that neither the number of threads nor who did what shows in the bits. Whoever
// finishes the last piece of a row finishes the row.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/explanations.h"

namespace introkernels::cpu {

class Statistics {
 public:
  // target_positions [B]: where each row's target stands among its classes, -1 for an ignored row.
  // dots, sq_norms [B, K]: the results, zeros for ignored rows.
  Statistics(const Explanations& explanations, const int64_t* target_positions, bool center,
             double* dots, double* sq_norms);

  // Computes all rows. row_done(row) is called in some thread once for each.
  template <typename RowDone>
  void compute(const RowDone& row_done) {
    const int64_t units_of_row = num_segments_ * num_class_blocks_;
    torch::stable::parallel_for(
        0, explanations_.num_rows() * units_of_row, grain(), [&](int64_t first, int64_t last) {
          for (int64_t unit = first; unit < last; ++unit) {
            const int64_t row = unit / units_of_row;
            compute_unit(row, unit % units_of_row);
            if (unfinished_[row].fetch_sub(1, std::memory_order_acq_rel) == 1) {
              finish(row);
              row_done(row);
            }
          }
        });
  }

 private:
  struct Sums {
    double* dots;
    double* sq_norms;
  };

  int64_t grain() const;
  Sums sums_of(int64_t row, int64_t segment) const;
  void compute_unit(int64_t row, int64_t unit) const;
  template <typename T>
  void add_segment(int64_t row, int64_t segment, int64_t first_class, int64_t num_classes,
                   Sums sums) const;
  const void* gradients_after(int64_t row) const;
  void finish(int64_t row) const;
  bool in_range_of_float(int64_t row) const;

  const Explanations& explanations_;
  const int64_t* target_positions_;
  bool center_;
  double* dots_;
  double* sq_norms_;
  int64_t slice_;
  int64_t segment_;
  int64_t num_segments_;
  int64_t class_block_;
  int64_t num_class_blocks_;
  Workspace workspace_;
  std::atomic<int32_t>* unfinished_;  // [B], units of the row
  double* partial_;                   // [B, num_segments, 2, K]; null where a row is one segment
};

}  // namespace introkernels::cpu
