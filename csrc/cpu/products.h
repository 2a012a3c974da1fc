// Blocked matrix products. Operands may come from anywhere (any dtype, squared, centred): functions
// fill a block of them at a time, which the processor's caches hold.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// A matrix of T in memory that somebody else owns; numbers of a row lie side by side.
template <typename T>
struct MatrixOf {
  T* data;
  int64_t stride;  // from row to row

  T* row(int64_t index) const { return data + index * stride; }
};

// All of a contiguous 2-D tensor, to be written.
template <typename T>
MatrixOf<T> matrix_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(1)};
}

// Rows [row, row + height) and columns [column, column + width) of an output.
struct Rectangle {
  int64_t row;
  int64_t height;
  int64_t column;
  int64_t width;
};

// out (+)= block of a number `a` times panels of b number `b`.
template <typename T>
struct Product {
  int a;
  int b;
  MatrixOf<T> out;
};

// Rows of a block of a. Three operands' blocks, for products that share panels of b, fill the
// second-level cache of a server's core.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockSize = kBlockRows * kRowStride;

// work(rectangle) for rectangles that make up an output of that size, one for each thread, in an
// arrangement that reads little twice. `operations` are the multiplications of the whole.
template <typename Work>
void for_each_rectangle(int64_t rows, int64_t columns, int64_t column_unit, int64_t operations,
                        const Work& work) {
  if (rows == 0 || columns == 0) return;
  constexpr int64_t kOperationsOfThread = 1 << 18;  // some ten microseconds
  const int64_t threads =
      std::clamp<int64_t>(operations / kOperationsOfThread, 1, torch::stable::get_num_threads());
  const int64_t units = (columns + column_unit - 1) / column_unit;
  int64_t row_parts = 1, column_parts = std::min(threads, units);
  for (int64_t parts = 2; parts <= std::min(threads, rows); ++parts) {
    const int64_t others = std::min(threads / parts, units);
    const bool uses_more = parts * others > row_parts * column_parts;
    const bool is_squarer =
        parts * others == row_parts * column_parts &&
        rows / parts + columns / others < rows / row_parts + columns / column_parts;
    if (uses_more || is_squarer) {
      row_parts = parts;
      column_parts = others;
    }
  }
  torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / column_parts, j = part % column_parts;
      const int64_t row = rows * i / row_parts;
      const int64_t column = std::min(columns, units * j / column_parts * column_unit);
      const int64_t column_end = std::min(columns, units * (j + 1) / column_parts * column_unit);
      work(Rectangle{row, rows * (i + 1) / row_parts - row, column, column_end - column});
    }
  });
}

// Rows and columns of an output that a block of a and panels of b side by side make.
template <typename T>
void multiply_panels(const Rectangle& part, const T* a, const T* panels, int64_t depth,
                     bool accumulate, const MatrixOf<T>& out) {
  const ProductKernels<T>& kernels = product_kernels<T>();
  alignas(64) T edge[kMaxTileRows * kMaxTileColumns];
  // Tiles of about the same height. Those of some rows follow each other, as their numbers do in
  // the output.
  const int64_t num_tiles = (part.height + kernels.rows - 1) / kernels.rows;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t first = part.height * tile / num_tiles;
    const int64_t height = part.height * (tile + 1) / num_tiles - first;
    const auto multiply = kernels.multiply[height];
    T* sums = out.row(part.row + first) + part.column;
    const T* const rows = a + first * kRowStride;
    const T* panel = panels;
    int64_t width = part.width;
    for (; width >= kernels.columns; width -= kernels.columns) {
      multiply(rows, panel, depth, sums, out.stride, accumulate);
      sums += kernels.columns;
      panel += kernels.columns * kDepth;
    }
    if (width == 0) continue;
    multiply(rows, panel, depth, edge, kernels.columns, false);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        T& sum = sums[i * out.stride + j];
        sum = (accumulate ? sum : T(0)) + edge[i * kernels.columns + j];
      }
    }
  }
}

// The products of one rectangle of the output, of sums over [0, depth).
//
// fill_a(row, height, k, count, a): writes numbers [k, k + count) of rows [row, row + height) of
// each of the num_a operands, kBlockSize apart, as rows of kRowStride.
// fill_b(column, width, k, count, b): writes rows [k, k + count) of columns [column, column +
// width) of each of the num_b operands, group_panels panels apart; panels of an operand lie side by
// side, each of kDepth * columns numbers. Columns past `width` may hold anything: their sums are
// dropped.
template <typename T, typename FillA, typename FillB>
void multiply_rectangle(const Rectangle& rectangle, int64_t depth, bool accumulate, int num_a,
                        int num_b, int64_t group_panels, const std::vector<Product<T>>& products,
                        const FillA& fill_a, const FillB& fill_b) {
  const int64_t tile_columns = product_kernels<T>().columns;
  const int64_t panel_size = kDepth * tile_columns, group_columns = group_panels * tile_columns;
  const Buffer<T> a(num_a * kBlockSize), b(num_b * group_panels * panel_size);
  const int64_t row_end = rectangle.row + rectangle.height;
  const int64_t column_end = rectangle.column + rectangle.width;
  for (int64_t row = rectangle.row; row < row_end; row += kBlockRows) {
    const int64_t height = std::min(kBlockRows, row_end - row);
    int64_t k = 0;
    do {  // once for sums of nothing, which are 0
      const int64_t count = std::min(kDepth, depth - k);
      fill_a(row, height, k, count, a.get());
      for (int64_t group = rectangle.column; group < column_end; group += group_columns) {
        const int64_t group_end = std::min(group + group_columns, column_end);
        fill_b(group, group_end - group, k, count, b.get());
        for (const Product<T>& product : products) {
          multiply_panels(Rectangle{row, height, group, group_end - group},
                          a.get() + product.a * kBlockSize,
                          b.get() + product.b * group_panels * panel_size, count,
                          accumulate || k > 0, product.out);
        }
      }
      k += count;
    } while (k < depth);
  }
}

// Panels of numbers that lie in rows already: read(k, buffer) points to the `width` numbers of row
// k, which it may write to the buffer.
template <typename T, typename Read>
void fill_panels(int64_t width, int64_t count, T* panels, const Read& read) {
  const ProductKernels<T>& kernels = product_kernels<T>();
  const Buffer<T> buffer(width);
  for (int64_t k = 0; k < count; ++k) {
    kernels.copy_to_panels(read(k, buffer.get()), width, panels + k * kernels.columns);
  }
}

}  // namespace introkernels::cpu
