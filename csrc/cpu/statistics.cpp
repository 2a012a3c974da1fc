#include "cpu/statistics.h"

namespace introkernels::cpu {

namespace {

// Dimensions of a row that one piece of work takes.
constexpr int64_t kSegment = 16384;

// Dimensions worked on at a time, for all classes. Each gradient is best read in one long piece,
// beside which x and E_y, 64 KiB of float each, stay in the L2 cache: in a bare loop two cores got
// 84 % of the bandwidth of a plain sum, and 64 % in pieces of 8 KiB. A gradient that is gathered
// first stays in the L1 cache. With centring each gradient of a slice is read twice, so a slice of
// all classes has to stay in the L2 cache.
int64_t slice_of(int64_t num_explained, bool center, bool in_one_piece) {
  constexpr int64_t kInL1 = 2048, kInL2 = 131072;
  if (!center) return in_one_piece ? kSegment : kInL1;
  return std::clamp<int64_t>(kInL2 / std::max<int64_t>(1, num_explained) / kPadding * kPadding, 64,
                             kInL1);
}

}  // namespace

Statistics::Statistics(const Explanations& explanations, const ExplainedClasses& classes,
                       bool center)
    : explanations_(explanations),
      classes_(classes),
      center_(center),
      slice_(slice_of(explanations.num_explained(), center, explanations.in_one_piece())),
      // Long enough that preparing x and E_y and adding up cost little beside it.
      segment_(center ? 8 * slice_ : kSegment),
      num_segments_(std::max<int64_t>(1, (explanations.num_dims() + segment_ - 1) / segment_)),
      class_block_(explanations.num_explained()),
      num_class_blocks_(1),
      unfinished_(explanations.num_rows()),
      sums_(explanations.num_rows() * num_segments_ * 2 * explanations.num_explained()) {
  require_kernels();
  const int64_t num_rows = explanations.num_rows(), num_explained = explanations.num_explained();
  // Some pieces for each thread. A mean over the classes needs all of them in one piece.
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t pieces = std::max<int64_t>(1, num_rows * num_segments_);
  if (!center && pieces < wanted && num_explained > 0) {
    constexpr int64_t kSmallestBlock = 8;
    const int64_t blocks = (wanted + pieces - 1) / pieces;
    class_block_ = std::max(kSmallestBlock, (num_explained + blocks - 1) / blocks);
    num_class_blocks_ = (num_explained + class_block_ - 1) / class_block_;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    new (&unfinished_.get()[row])
        std::atomic<int32_t>(static_cast<int32_t>(num_segments_ * num_class_blocks_));
  }
}

int64_t Statistics::grain() const {
  return row_grain(class_block_ * std::min(segment_, explanations_.num_dims()));
}

Statistics::Sums Statistics::sums_of(int64_t row, int64_t segment) const {
  const int64_t num_explained = explanations_.num_explained();
  double* const sums = sums_.get() + (row * num_segments_ + segment) * 2 * num_explained;
  return {sums, sums + num_explained};
}

void Statistics::compute_unit(int64_t row, int64_t unit) const {
  if (classes_.target_position(row) < 0) return;
  const int64_t segment = unit / num_class_blocks_;
  const int64_t first = unit % num_class_blocks_ * class_block_;
  const int64_t count = std::min(class_block_, explanations_.num_explained() - first);
  if (explanations_.number() == Number::kFloat64) {
    add_segment<double>(row, segment, first, count, sums_of(row, segment));
  } else {
    add_segment<float>(row, segment, first, count, sums_of(row, segment));
  }
}

template <typename T>
void Statistics::add_segment(int64_t row, int64_t segment, int64_t first_class, int64_t num_classes,
                             Sums sums) const {
  const KernelsOf<T>& kernels = cpu::kernels().of<T>();
  const int64_t num_explained = explanations_.num_explained();
  const int64_t target = classes_.target_position(row);
  const bool in_place = explanations_.in_one_piece();
  std::fill(sums.dots + first_class, sums.dots + first_class + num_classes, 0.0);
  std::fill(sums.sq_norms + first_class, sums.sq_norms + first_class + num_classes, 0.0);

  const int64_t width = padded(std::min(slice_, explanations_.num_dims()));
  const Buffer<T> numbers(5 * width);
  T* const inputs = numbers.get();
  T* const target_explanation = inputs + width;
  T* const gathered = target_explanation + width;
  T* const mean_high = gathered + width;
  T* const mean_low = mean_high + width;
  const Buffer<double> sums_of_gradients(width);
  double* const mean = sums_of_gradients.get();

  const int64_t end = std::min((segment + 1) * segment_, explanations_.num_dims());
  for (int64_t begin = segment * segment_; begin < end; begin += slice_) {
    const int64_t count = std::min(slice_, end - begin);
    if (center_) {
      std::fill(mean, mean + count, 0.0);
      for (int64_t k = 0; k < num_explained; ++k) {
        if (in_place) {
          kernels.accumulate[int(explanations_.number())](explanations_.gradient(row, k, begin),
                                                          count, mean);
        } else {
          explanations_.read_gradient(row, k, begin, count, gathered);
          kernels.accumulate[int(number_as<T>())](gathered, count, mean);
        }
      }
      // What a float can't hold of the mean is taken away too: explanations may differ by less
      // than a float's precision of what they have in common.
      for (int64_t d = 0; d < count; ++d) {
        mean[d] /= static_cast<double>(num_explained);
        mean_high[d] = static_cast<T>(mean[d]);
        mean_low[d] = static_cast<T>(mean[d] - static_cast<double>(mean_high[d]));
      }
      std::fill(mean_high + count, mean_high + padded(count), T(0));
      std::fill(mean_low + count, mean_low + padded(count), T(0));
    }
    const StatisticsSlice<T> slice{explanations_.inputs(row, begin, count, inputs),
                                   target_explanation,
                                   center_ ? mean_high : nullptr,
                                   center_ ? mean_low : nullptr,
                                   count,
                                   gradients_after(row)};
    if (in_place) {
      kernels.explain[int(explanations_.number())](explanations_.gradient(row, target, begin),
                                                   slice, target_explanation);
      kernels.inner_products[int(explanations_.number())](
          explanations_.gradient(row, first_class, begin), explanations_.class_stride_in_bytes(),
          num_classes, slice, sums.dots + first_class, sums.sq_norms + first_class);
    } else {
      explanations_.read_gradient(row, target, begin, count, gathered);
      kernels.explain[int(number_as<T>())](gathered, slice, target_explanation);
      for (int64_t k = first_class; k < first_class + num_classes; ++k) {
        explanations_.read_gradient(row, k, begin, count, gathered);
        kernels.inner_products[int(number_as<T>())](gathered, 0, 1, slice, sums.dots + k,
                                                    sums.sq_norms + k);
      }
    }
  }
}

// Where the gradients begin that are read after those of a row, where a row is one slice.
const void* Statistics::gradients_after(int64_t row) const {
  const bool is_whole = !center_ && num_segments_ * num_class_blocks_ == 1;
  const bool has_next = row + 1 < explanations_.num_rows() && explanations_.in_one_piece();
  return is_whole && has_next ? explanations_.gradient(row + 1, 0, 0) : nullptr;
}

bool Statistics::in_range_of_float(const Sums& sums) const {
  constexpr double kSmallest = 1e-24, kLargest = 1e36;
  return std::all_of(sums.sq_norms, sums.sq_norms + explanations_.num_explained(),
                     [](double v) { return v >= kSmallest && v <= kLargest; });
}

// Those of the whole row, in the place of its first segment's.
Statistics::Sums Statistics::finish(int64_t row) const {
  const int64_t num_explained = explanations_.num_explained();
  const Sums total = sums_of(row, 0);
  if (classes_.target_position(row) < 0) {
    std::fill(total.dots, total.dots + num_explained, 0.0);
    std::fill(total.sq_norms, total.sq_norms + num_explained, 0.0);
    return total;
  }
  const auto add_up = [&] {
    for (int64_t segment = 1; segment < num_segments_; ++segment) {
      const Sums sums = sums_of(row, segment);
      for (int64_t k = 0; k < num_explained; ++k) {
        total.dots[k] += sums.dots[k];
        total.sq_norms[k] += sums.sq_norms[k];
      }
    }
  };
  add_up();
  if (explanations_.number() == Number::kFloat64 || in_range_of_float(total)) return total;
  for (int64_t segment = 0; segment < num_segments_; ++segment) {
    add_segment<double>(row, segment, 0, num_explained, sums_of(row, segment));
  }
  add_up();
  return total;
}

}  // namespace introkernels::cpu
