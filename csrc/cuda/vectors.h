// Rows of matrices as vectors of N classes, loaded and stored by as wide words as they lie in.
//
// Vector v is classes [v N, v N + N), wherever a row begins, so that sums come out the same, to the
// bit, wherever a tensor lies.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/number.h"

namespace introkernels::cuda {

// In the place of a storage type: one that a Matrix tells at run time.
struct AnyNumber {};

template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};

// A vector as what loads and stores move, up to 16 bytes at a time, and as its numbers.
template <typename S, int N>
union Words {
  using Word = typename WordOf<(sizeof(S) * N < 16 ? int(sizeof(S)) * N : 16)>::type;
  static constexpr int kWords = int(sizeof(S) * N / sizeof(Word));

  Word words[kWords];
  uint32_t pairs[sizeof(S) * N < 4 ? 1 : sizeof(S) * N / 4];
  S values[N];
};

// Calls work(S{}) for a storage type.
template <typename Work>
__device__ __forceinline__ void with_storage(NumberType type, const Work& work) {
  if (type == NumberType::kFloat32) {
    work(float{});
  } else if (type == NumberType::kBFloat16) {
    work(BFloat16{});
  } else if (type == NumberType::kFloat16) {
    work(Float16{});
  } else {
    work(double{});
  }
}

template <typename S>
__device__ __forceinline__ int64_t size_of(NumberType type) {
  if constexpr (std::is_same_v<S, AnyNumber>) {
    return size_of(type);
  } else {
    return int64_t(sizeof(S));
  }
}

// One row of a matrix of S, read as T by N classes at a time.
template <typename S, typename T, int N>
class Row {
  static constexpr bool kIsAny = std::is_same_v<S, AnyNumber>;

 public:
  // N numbers on their way: as they lie in memory, where the type is known.
  struct AsNumbers {
    T values[N];
  };
  using Fetched = std::conditional_t<kIsAny, AsNumbers, Words<std::conditional_t<kIsAny, T, S>, N>>;

  __device__ __forceinline__ Row(const Matrix& matrix, int64_t row)
      : column_stride_(matrix.column_stride), type_(matrix.type) {
    const int64_t size = size_of<S>(type_);
    data_ = static_cast<const char*>(matrix.data) + row * matrix.row_stride * size;
    const int64_t word = size * N < 16 ? size * N : 16;
    is_whole_ = column_stride_ == 1 && reinterpret_cast<uint64_t>(data_) % uint64_t(word) == 0;
  }

  // Whether vectors within the row can be read as whole words.
  __device__ __forceinline__ bool is_whole() const { return is_whole_; }

  // Where vector v lies, in a row that is whole and of a known type.
  __device__ __forceinline__ const Fetched* at(int v) const {
    return reinterpret_cast<const Fetched*>(data_) + v;
  }

  __device__ __forceinline__ static void fetch_whole(const Fetched* from, Fetched* out) {
#pragma unroll
    for (int i = 0; i < Fetched::kWords; ++i) out->words[i] = from->words[i];
  }

  // Classes [first, first + N) of a row of num_classes; -inf for those outside of it.
  __device__ __forceinline__ void fetch(int64_t first, int64_t num_classes, Fetched* out) const {
    if constexpr (kIsAny) {
      with_storage(type_, [&](auto storage) {
        Words<decltype(storage), N> words;
        fetch_words(first, num_classes, &words);
#pragma unroll
        for (int i = 0; i < N; ++i) out->values[i] = T(widened(words.values[i]));
      });
    } else {
      fetch_words(first, num_classes, out);
    }
  }

  __device__ __forceinline__ static void convert(const Fetched& fetched, T (&out)[N]) {
    if constexpr (std::is_same_v<S, BFloat16> && N % 2 == 0) {
      // One instruction each; the upper one of a pair by itself would take two.
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        out[2 * i] = T(__uint_as_float(fetched.pairs[i] << 16));
        out[2 * i + 1] = T(__uint_as_float(fetched.pairs[i] & 0xffff0000U));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (kIsAny) {
        out[i] = fetched.values[i];
      } else {
        out[i] = T(widened(fetched.values[i]));
      }
    }
  }

  __device__ __forceinline__ T value(int64_t c) const {
    T value{};
    if constexpr (kIsAny) {
      with_storage(type_, [&](auto storage) {
        value = T(widened(reinterpret_cast<const decltype(storage)*>(data_)[c * column_stride_]));
      });
    } else {
      value = T(widened(reinterpret_cast<const S*>(data_)[c * column_stride_]));
    }
    return value;
  }

 private:
  template <typename Storage>
  __device__ __forceinline__ void fetch_words(int64_t first, int64_t num_classes,
                                              Words<Storage, N>* out) const {
    using W = Words<Storage, N>;
    const Storage* const row = reinterpret_cast<const Storage*>(data_);
    if (is_whole_ && first + N <= num_classes) {
      const auto* const words = reinterpret_cast<const typename W::Word*>(row + first);
#pragma unroll
      for (int i = 0; i < W::kWords; ++i) out->words[i] = words[i];
      return;
    }
    if constexpr (sizeof(Storage) == 2 && N % 2 == 0) {
      // Two by two, from one word on that may begin one class earlier and end one later. The first
      // and the last vector of a row might so reach beyond the tensor.
      if (column_stride_ == 1 && first > 0 && first + N < num_classes) {
        const uint64_t begin = reinterpret_cast<uint64_t>(row + first);
        const auto* const pairs = reinterpret_cast<const uint32_t*>(begin / 4 * 4);
        uint32_t pair = pairs[0];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const uint32_t next = begin % 4 == 0 && i == N / 2 - 1 ? 0U : pairs[i + 1];
          out->pairs[i] = begin % 4 == 0 ? pair : pair >> 16 | next << 16;
          pair = next;
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t c = first + i;
      out->values[i] =
          c < num_classes ? row[c * column_stride_] : narrowed<Storage>(kNever<Computed<Storage>>);
    }
  }

  const char* data_;
  int64_t column_stride_;
  NumberType type_;
  bool is_whole_ = false;
};

// One row of a contiguous matrix of S, written from T.
template <typename S, typename T, int N>
class OutputRow {
 public:
  __device__ __forceinline__ OutputRow(void* data, NumberType type, int64_t row,
                                       int64_t num_classes)
      : data_(static_cast<char*>(data)), begin_(row * num_classes), type_(type) {}

  __device__ __forceinline__ void store(int64_t first, int64_t num_classes,
                                        const T (&values)[N]) const {
    if constexpr (std::is_same_v<S, AnyNumber>) {
      with_storage(type_,
                   [&](auto storage) { store_as<decltype(storage)>(first, num_classes, values); });
    } else {
      store_as<S>(first, num_classes, values);
    }
  }

 private:
  template <typename Storage>
  __device__ __forceinline__ void store_as(int64_t first, int64_t num_classes,
                                           const T (&values)[N]) const {
    using W = Words<Storage, N>;
    Storage* const row = reinterpret_cast<Storage*>(data_) + begin_;
    W both;
#pragma unroll
    for (int i = 0; i < N; ++i) both.values[i] = narrowed<Storage>(Computed<Storage>(values[i]));
    const bool is_aligned = reinterpret_cast<uint64_t>(row + first) % sizeof(typename W::Word) == 0;
    if (is_aligned && first + N <= num_classes) {
      auto* const words = reinterpret_cast<typename W::Word*>(row + first);
#pragma unroll
      for (int i = 0; i < W::kWords; ++i) words[i] = both.words[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t c = first + i;
      if (c < num_classes) row[c] = both.values[i];
    }
  }

  char* data_;
  int64_t begin_;
  NumberType type_;
};

__device__ __forceinline__ double weight_of(const Rows& rows, int64_t c) {
  return rows.weight.data == nullptr ? 1.0 : Row<AnyNumber, double, 1>(rows.weight, 0).value(c);
}

// 32 bits count the vectors of a row of more than 8 billion classes, and save registers.
template <int N>
__host__ __device__ __forceinline__ int num_vectors(int64_t num_classes) {
  return int((num_classes + N - 1) / N);
}

}  // namespace introkernels::cuda
