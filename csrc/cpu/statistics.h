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
  // The arguments have to outlive this object.
  Statistics(const Explanations& explanations, const ExplainedClasses& classes, bool center);

  // Computes all rows. row_done(row, dots, sq_norms) is called in some thread once for each, with
  // statistics [K] that are zeros for an ignored row.
  template <typename RowDone>
  void compute(const RowDone& row_done) {
    const int64_t units_of_row = num_segments_ * num_class_blocks_;
    torch::stable::parallel_for(
        0, explanations_.num_rows() * units_of_row, grain(), [&](int64_t first, int64_t last) {
          for (int64_t unit = first; unit < last; ++unit) {
            const int64_t row = unit / units_of_row;
            compute_unit(row, unit % units_of_row);
            if (unfinished_.get()[row].fetch_sub(1, std::memory_order_acq_rel) == 1) {
              const Sums sums = finish(row);
              row_done(row, sums.dots, sums.sq_norms);
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
  Sums finish(int64_t row) const;
  // Squares of float explanations neither overflowed nor lost what matters to underflow.
  bool in_range_of_float(const Sums& sums) const;

  const Explanations& explanations_;
  const ExplainedClasses& classes_;
  bool center_;
  int64_t slice_;
  int64_t segment_;
  int64_t num_segments_;
  int64_t class_block_;
  int64_t num_class_blocks_;
  Buffer<std::atomic<int32_t>> unfinished_;  // [B], units of the row
  Buffer<double> sums_;                      // [B, num_segments, 2, K]
};

}  // namespace introkernels::cpu
