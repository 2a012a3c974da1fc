// The table of one target's kernels; to be included once the target is chosen.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/numbers.h"
#include "cpu/simd/product_kernels.h"
#include "cpu/simd/row_kernels.h"
#include "cpu/simd/statistics_kernels.h"
#include "cpu/simd/teacher_kernels.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

template <typename T>
constexpr KernelsOf<T> table_of() {
  KernelsOf<T> table{};
  table.row_sums = row_sums<T>;
  table.row_backward = row_backward<T>;
  table.teacher_logits = teacher_logits<T, T>;
  table.teacher_logits_of_doubles = teacher_logits<double, T>;
  table.explain[int(Number::kFloat32)] = explain<T, float>;
  table.explain[int(Number::kBFloat16)] = explain<T, BFloat16>;
  table.explain[int(Number::kFloat16)] = explain<T, Float16>;
  table.inner_products[int(Number::kFloat32)] = inner_products<T, float>;
  table.inner_products[int(Number::kBFloat16)] = inner_products<T, BFloat16>;
  table.inner_products[int(Number::kFloat16)] = inner_products<T, Float16>;
  table.accumulate[int(Number::kFloat32)] = accumulate<float>;
  table.accumulate[int(Number::kBFloat16)] = accumulate<BFloat16>;
  table.accumulate[int(Number::kFloat16)] = accumulate<Float16>;
  table.load[int(Number::kFloat32)] = load_row<T, float>;
  table.load[int(Number::kBFloat16)] = load_row<T, BFloat16>;
  table.load[int(Number::kFloat16)] = load_row<T, Float16>;
  table.store[int(Number::kFloat32)] = store_row<float>;
  table.store[int(Number::kBFloat16)] = store_row<BFloat16>;
  table.store[int(Number::kFloat16)] = store_row<Float16>;
  table.load[int(Number::kFloat64)] = load_row<T, double>;
  if constexpr (sizeof(T) == sizeof(double)) {
    table.accumulate[int(Number::kFloat64)] = accumulate<double>;
    table.explain[int(Number::kFloat64)] = explain<T, double>;
    table.inner_products[int(Number::kFloat64)] = inner_products<T, double>;
    table.store[int(Number::kFloat64)] = store_row<double>;
  }
  table.products = product_table<T>();
  return table;
}

const Kernels kKernels{table_of<float>(), table_of<double>()};

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
