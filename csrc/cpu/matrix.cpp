#include "cpu/matrix.h"

#include <algorithm>
#include <array>

namespace introkernels::cpu {

namespace {

using torch::stable::narrow;

void mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
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

template <typename Work>
void for_each_tile(int64_t rows, int64_t columns, const Work& work) {
  if (rows == 0 || columns == 0) return;
  const Tiles tiles(rows, columns);
  torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    const NoGrad no_grad;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / tiles.per_row() * tiles.tile_rows;
      const int64_t column = tile % tiles.per_row() * tiles.tile_columns;
      work(row, std::min(tiles.tile_rows, rows - row), column,
           std::min(tiles.tile_columns, columns - column));
    }
  });
}

template <typename T>
void add_tile(const Tensor& tile, int64_t row, int64_t column, Tensor& sum) {
  const T* source = static_cast<const T*>(tile.const_data_ptr());
  T* destination = static_cast<T*>(sum.mutable_data_ptr());
  const int64_t height = tile.size(0), width = tile.size(1), stride = sum.size(1);
  for (int64_t i = 0; i < height; ++i) {
    T* out = destination + (row + i) * stride + column;
    for (int64_t j = 0; j < width; ++j) out[j] += source[i * width + j];
  }
}

}  // namespace

NoGrad::NoGrad() : previous_(aoti_torch_grad_mode_is_enabled()) {
  aoti_torch_grad_mode_set_enabled(false);
}

NoGrad::~NoGrad() { aoti_torch_grad_mode_set_enabled(previous_); }

void matmul_into(const Tensor& a, const Tensor& b, Tensor& out) {
  for_each_tile(a.size(0), b.size(1),
                [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                  Tensor rows_of_out = narrow(out, 0, row, height);
                  Tensor tile = narrow(rows_of_out, 1, column, width);
                  Tensor a_rows = a, b_columns = b;
                  mm_out(narrow(a_rows, 0, row, height), narrow(b_columns, 1, column, width), tile);
                });
}

void matmul_add_into(const Tensor& a, const Tensor& b, Tensor& sum) {
  for_each_tile(a.size(0), b.size(1),
                [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                  Tensor tile = new_empty(sum, {height, width}, sum.scalar_type());
                  Tensor a_rows = a, b_columns = b;
                  mm_out(narrow(a_rows, 0, row, height), narrow(b_columns, 1, column, width), tile);
                  if (sum.scalar_type() == ScalarType::Double) {
                    add_tile<double>(tile, row, column, sum);
                  } else {
                    add_tile<float>(tile, row, column, sum);
                  }
                });
}

}  // namespace introkernels::cpu
