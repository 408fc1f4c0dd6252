// Small matrix products out of cache, for the attention kernels. Everything is a panel: a matrix whose rows are kPanel
// numbers wide and follow each other, so that two vectors hold a row and no address depends on the problem's size.
#pragma once

#include "vec.h"

namespace pyard::cpu {
namespace {

// Rows of a register tile: with two vectors a row, as many as the registers hold beside the operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

template <typename A>
constexpr int kPanel = 2 * kLanes<A>;

// Where a product begins: at zero, at what c holds, or at c times a factor per column.
enum class Start { fresh, onto, rescaled };

// How the left factor lies in memory: element (row, k) at a[k * lda + row], or at a[row * kPanel + k].
enum class Left { transposed, panel };

template <typename A>
struct Product {
  int64_t rows;
  int64_t depth;
  const A* a;  // the left factor, [rows, depth], laid out as `Left` says
  int64_t lda;
  const A* b;       // [depth, kPanel]
  A* c;             // [rows, kPanel]
  const A* factor;  // [kPanel], for Start::rescaled
};

template <typename A, Left left, Start start, int Rows, int Vectors>
inline void multiply_tile(const Product<A>& p, int64_t row) {
  constexpr int lanes = kLanes<A>;
  Vec<A> sum[Rows][Vectors];
  A* c = p.c + row * kPanel<A>;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = Vec<A>{};
      if constexpr (start != Start::fresh) sum[r][v] = load(c + r * kPanel<A> + v * lanes, Full{});
      if constexpr (start == Start::rescaled) sum[r][v] *= load(p.factor + v * lanes, Full{});
    }
  }
  const A* b = p.b;
  const A* a = left == Left::transposed ? p.a + row : p.a + row * kPanel<A>;
  const int64_t a_step = left == Left::transposed ? p.lda : 1;
  for (int64_t k = 0; k < p.depth; ++k, a += a_step, b += kPanel<A>) {
    Vec<A> right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * lanes, Full{});
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const A factor = a[left == Left::transposed ? r : r * kPanel<A>];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += right[v] * factor;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(c + r * kPanel<A> + v * lanes, sum[r][v], Full{});
  }
}

template <typename A, Left left, Start start, int Vectors>
void multiply_vectors(const Product<A>& p) {
  int64_t row = 0;
  for (; row + kTileRows <= p.rows; row += kTileRows) multiply_tile<A, left, start, kTileRows, Vectors>(p, row);
  if constexpr (kTileRows > 8) {
    for (; row + 8 <= p.rows; row += 8) multiply_tile<A, left, start, 8, Vectors>(p, row);
  }
  for (; row + 4 <= p.rows; row += 4) multiply_tile<A, left, start, 4, Vectors>(p, row);
  for (; row + 2 <= p.rows; row += 2) multiply_tile<A, left, start, 2, Vectors>(p, row);
  for (; row < p.rows; ++row) multiply_tile<A, left, start, 1, Vectors>(p, row);
}

// c = start + a b, in the first `columns` columns of c and b; the columns beside them may be written too.
template <typename A, Left left, Start start>
inline void multiply(const Product<A>& p, int64_t columns) {
  if (columns > kLanes<A>) {
    multiply_vectors<A, left, start, 2>(p);
  } else {
    multiply_vectors<A, left, start, 1>(p);
  }
}

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Lanes [stride * odd, ...) of two vectors change places: one of the log2(lanes) passes of a transposition.
template <typename A, int Stride>
inline void exchange(Vec<A>& a, Vec<A>& b) {
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vec<Index> low, high;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    const bool odd = (lane / Stride) % 2 != 0;
    low[lane] = odd ? lane - Stride + kLanes<A> : lane;
    high[lane] = odd ? lane + kLanes<A> : lane + Stride;
  }
#if defined(__clang__)
  // Clang has no shuffle by a vector of indices; it sees through the loops.
  const Vec<A> x = a, y = b;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    a[lane] = low[lane] < kLanes<A> ? x[low[lane]] : y[low[lane] - kLanes<A>];
    b[lane] = high[lane] < kLanes<A> ? x[high[lane]] : y[high[lane] - kLanes<A>];
  }
#else
  const Vec<A> x = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = x;
#endif
}

template <typename A, int Stride = kLanes<A> / 2>
inline void transpose_square(Vec<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes<A>; ++row) {
    if ((row / Stride) % 2 == 0) exchange<A, Stride>(rows[row], rows[row + Stride]);
  }
  if constexpr (Stride > 1) transpose_square<A, Stride / 2>(rows);
}

// out[d * ld + row] = factor * in[row * stride + d]; rows are filled up with zeros to whole vectors.
template <typename T>
void transpose_in(const T* in, int64_t stride, int64_t rows, int64_t dim, Accumulator<T> factor, Accumulator<T>* out,
                  int64_t ld) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  for (int64_t row = 0; row < rows; row += lanes) {
    for_each_vector<A>(dim, [&](int64_t d, auto part) {
      Vec<A> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        square[i] = row + i < rows ? load(in + (row + i) * stride + d, part) * factor : Vec<A>{};
      }
      transpose_square<A>(square);
      const int64_t here = dim - d < lanes ? dim - d : lanes;
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (i < here) store(out + (d + i) * ld + row, square[i], Full{});
      }
    });
  }
}

// out[row * stride + d] = factor * in[d * ld + row], the way back.
template <typename T>
void transpose_out(const Accumulator<T>* in, int64_t ld, int64_t rows, int64_t dim, Accumulator<T> factor, T* out,
                   int64_t stride) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  for (int64_t row = 0; row < rows; row += lanes) {
    for_each_vector<A>(dim, [&](int64_t d, auto part) {
      const int64_t here = dim - d < lanes ? dim - d : lanes;
      Vec<A> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        square[i] = i < here ? load(in + (d + i) * ld + row, Full{}) * factor : Vec<A>{};
      }
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (row + i < rows) store(out + (row + i) * stride + d, square[i], part);
      }
    });
  }
}

// out[row * ld + d] = factor * in[row * stride + d], converted; rows end with zeros up to a whole vector.
template <typename T>
void copy_in(const T* in, int64_t stride, int64_t rows, int64_t dim, Accumulator<T> factor, Accumulator<T>* out,
             int64_t ld) {
  for (int64_t row = 0; row < rows; ++row) {
    for_each_vector<Accumulator<T>>(dim, [&](int64_t d, auto part) {
      store(out + row * ld + d, load(in + row * stride + d, part) * factor, Full{});
    });
  }
}

}  // namespace
}  // namespace pyard::cpu
