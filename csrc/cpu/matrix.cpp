#include "cpu/matrix.h"

#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <array>

namespace introkernels::cpu {

namespace {

void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The result is `out` once more; taking it releases the reference.
  torch::stable::detail::to<Tensor>(stack[0]);
}

// A BLAS splits one product among threads as it likes, which changes the order of its sums. So the
// output is cut into tiles that depend on its shape alone, each the work of a single thread: inside
// a parallel region BLAS does not start threads of its own. There are always at least two tiles
// (but for a single number), because a loop of one does not open a parallel region.
struct Tiles {
  int64_t rows;
  int64_t columns;
  int64_t tile_rows;
  int64_t tile_columns;

  Tiles(int64_t rows_in, int64_t columns_in) : rows(rows_in), columns(columns_in) {
    // Tall enough for BLAS to be efficient, small enough to occupy all cores of a large machine.
    tile_rows = std::min<int64_t>(rows, 128);
    tile_columns = std::min<int64_t>(columns, 512);
    if (count() == 1) {
      if (columns > 1) {
        tile_columns = (columns + 1) / 2;
      } else {
        tile_rows = std::max<int64_t>(1, (rows + 1) / 2);
      }
    }
  }
  int64_t per_row() const { return (columns + tile_columns - 1) / tile_columns; }
  int64_t count() const { return (rows + tile_rows - 1) / tile_rows * per_row(); }
};

// work(a_rows, b_columns, tile) for each tile of out = a @ b.
template <typename Work>
void for_each_tile(const MatrixView& a, const MatrixView& b, const MatrixView& out,
                   const Work& work) {
  if (out.rows == 0 || out.columns == 0) return;
  const Tiles tiles(out.rows, out.columns);
  torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / tiles.per_row() * tiles.tile_rows;
      const int64_t column = tile % tiles.per_row() * tiles.tile_columns;
      const int64_t height = std::min(tiles.tile_rows, out.rows - row);
      const int64_t width = std::min(tiles.tile_columns, out.columns - column);
      work(a.block(row, height, 0, a.columns), b.block(0, b.rows, column, width),
           out.block(row, height, column, width));
    }
  });
}

template <typename T>
void add(const MatrixView& tile, const MatrixView& sum) {
  const T* source = reinterpret_cast<const T*>(tile.data);
  T* destination = reinterpret_cast<T*>(sum.data);
  for (int64_t i = 0; i < sum.rows; ++i) {
    T* out = destination + i * sum.row_stride;
    for (int64_t j = 0; j < sum.columns; ++j) out[j * sum.column_stride] += *source++;
  }
}

}  // namespace

MatrixView MatrixView::of(const Tensor& tensor) {
  return {const_cast<char*>(static_cast<const char*>(tensor.const_data_ptr())),
          tensor.scalar_type(),
          tensor.size(0),
          tensor.size(1),
          tensor.stride(0),
          tensor.stride(1)};
}

MatrixView MatrixView::block(int64_t row, int64_t height, int64_t column, int64_t width) const {
  const int64_t offset = row * row_stride + column * column_stride;
  return {data + offset * item_size(dtype), dtype, height, width, row_stride, column_stride};
}

Tensor MatrixView::tensor() const {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(data, {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

void matmul_into(const MatrixView& a, const MatrixView& b, const MatrixView& out) {
  for_each_tile(a, b, out,
                [](const MatrixView& a_rows, const MatrixView& b_columns, const MatrixView& tile) {
                  mm_out(a_rows.tensor(), b_columns.tensor(), tile.tensor());
                });
}

void matmul_add_into(const MatrixView& a, const MatrixView& b, const MatrixView& sum) {
  const Tensor like = sum.tensor();
  for_each_tile(a, b, sum,
                [&](const MatrixView& a_rows, const MatrixView& b_columns, const MatrixView& tile) {
                  const Tensor product = new_empty(like, {tile.rows, tile.columns}, tile.dtype);
                  // Through a view: the product itself may be an inference tensor.
                  const MatrixView view = MatrixView::of(product);
                  mm_out(a_rows.tensor(), b_columns.tensor(), view.tensor());
                  if (tile.dtype == ScalarType::Double) {
                    add<double>(view, tile);
                  } else {
                    add<float>(view, tile);
                  }
                });
}

}  // namespace introkernels::cpu
