// Checks of index values on the host, before any kernel reads by them. PyTorch's bindings turn
// std::out_of_range into IndexError and std::invalid_argument into ValueError.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace introkernels {

// int64 indices of one or two dimensions, read where they lie; strides count elements.
class IndexView {
 public:
  IndexView(const int64_t* data, const std::array<int64_t, 2>& sizes,
            const std::array<int64_t, 2>& strides)
      : data_(data), sizes_(sizes), strides_(strides) {}

  int64_t operator()(int64_t row) const { return data_[row * strides_[0]]; }
  int64_t operator()(int64_t row, int64_t column) const {
    return data_[row * strides_[0] + column * strides_[1]];
  }
  void read(int64_t row, int64_t* out) const {
    for (int64_t k = 0; k < sizes_[1]; ++k) out[k] = (*this)(row, k);
  }
  int64_t size(int64_t dim) const { return sizes_[static_cast<size_t>(dim)]; }

 private:
  const int64_t* data_;
  std::array<int64_t, 2> sizes_;
  std::array<int64_t, 2> strides_;
};

inline std::string row_as_text(const std::vector<int64_t>& row) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < row.size(); ++i) text << (i ? ", " : "") << row[i];
  text << ']';
  return text.str();
}

// Throws std::out_of_range for a target outside [0, num_classes) that is not ignore_index.
inline void check_targets(const IndexView& target, int64_t num_classes, int64_t ignore_index) {
  for (int64_t row = 0; row < target.size(0); ++row) {
    const int64_t y = target(row);
    if (y == ignore_index || (y >= 0 && y < num_classes)) continue;
    std::ostringstream text;
    text << "target[" << row << "] is " << y << ", outside [0, " << num_classes
         << ") and not ignore_index=" << ignore_index;
    throw std::out_of_range(text.str());
  }
}

// Throws std::out_of_range for a class outside [0, num_classes), and std::invalid_argument for a
// row that names a class twice or lacks its target. Ignored rows may hold anything.
inline void check_class_index(const IndexView& class_index, const IndexView& target,
                              int64_t num_classes, int64_t ignore_index) {
  const int64_t num_explained = class_index.size(1);
  std::vector<int64_t> classes(static_cast<size_t>(num_explained));
  // Check by check rather than row by row, so that the same call raises the same error on every
  // backend.
  const auto for_each_row = [&](const auto& check) {
    for (int64_t row = 0; row < target.size(0); ++row) {
      if (target(row) == ignore_index) continue;
      class_index.read(row, classes.data());
      check(row);
    }
  };
  for_each_row([&](int64_t row) {
    for (int64_t k = 0; k < num_explained; ++k) {
      const int64_t c = classes[static_cast<size_t>(k)];
      if (c >= 0 && c < num_classes) continue;
      std::ostringstream text;
      text << "class_index[" << row << ", " << k << "] is " << c << ", outside [0, ";
      if (num_classes == std::numeric_limits<int64_t>::max()) {
        text << "num_classes)";
      } else {
        text << num_classes << ")";
      }
      throw std::out_of_range(text.str());
    }
  });
  for_each_row([&](int64_t row) {
    if (std::find(classes.begin(), classes.end(), target(row)) != classes.end()) return;
    std::ostringstream text;
    text << "class_index[" << row << "] must hold the row's target " << target(row) << ", got "
         << row_as_text(classes);
    throw std::invalid_argument(text.str());
  });
  for_each_row([&](int64_t row) {
    std::vector<int64_t> ordered = classes;
    std::sort(ordered.begin(), ordered.end());
    if (std::adjacent_find(ordered.begin(), ordered.end()) == ordered.end()) return;
    std::ostringstream text;
    text << "class_index[" << row << "] must name each class once, got " << row_as_text(classes);
    throw std::invalid_argument(text.str());
  });
}

}  // namespace introkernels
