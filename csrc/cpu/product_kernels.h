// The innermost loops of matrix products.
//
// A product out[m, n] = sum over k of a[m, k] b[k, n] is made of tiles of a few rows and
// `columns` columns, whose sums stay in registers. Operands are copied beforehand to where a tile
// finds them in order:
//   a block of a: rows of kRowStride numbers, of which up to kDepth are used;
//   a panel of b: for each k the `columns` numbers b[k, n] side by side.
// Every number of the output is one sum over k, in order, whatever tile it lies in: its bits depend
// neither on the size of the matrices nor on who computes which part of them.
#pragma once

#include <cstdint>

namespace introkernels::cpu {

// Numbers of a sum that are added up in registers. A panel of b of that depth and a few rows of a
// fit into 48 KiB of first-level cache.
constexpr int64_t kDepth = 256;
// Further apart than kDepth, so that the rows of a tile don't compete for the same cache lines. A
// constant, so that a tile addresses all of its rows from one pointer.
constexpr int64_t kRowStride = kDepth + 16;

constexpr int kMaxTileRows = 14;
constexpr int kMaxTileColumns = 32;

template <typename T>
struct ProductKernels {
  int64_t rows;     // of the tallest tile, at most kMaxTileRows
  int64_t columns;  // of every tile

  // multiply[r]: the tile out [r, columns] = or += a [r, depth] b [depth, columns].
  void (*multiply[kMaxTileRows + 1])(const T* a, const T* panel, int64_t depth, T* out,
                                     int64_t out_stride, bool accumulate);
  // out[k * out_stride + n] = rows[n][k] for n < columns, k < depth.
  void (*transpose)(const T* const* rows, int64_t depth, T* out, int64_t out_stride);
  // Panels side by side, of which `panels` points to some k: their numbers there are row[0], ...,
  // row[width - 1] and, up to the end of the last panel, zeros.
  void (*copy_to_panels)(const T* row, int64_t width, T* panels);
  // squares = (values * scale)^2.
  void (*square)(const T* values, int64_t count, const T scale[2], T* squares);
  // squares = (values * scale)^2; weighted = squares * factors * factor_scale.
  void (*square_and_weigh)(const T* values, const T* factors, int64_t count, const T scale[2],
                           T factor_scale, T* squares, T* weighted);
  // The largest |value|, 0 where there is none; NaN counts for nothing.
  T (*largest)(const T* values, int64_t count);
};

}  // namespace introkernels::cpu
