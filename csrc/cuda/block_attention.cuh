// What the forward and the backward kernels of block_attention share.
#pragma once

#include <launchers.h>

#include <fragments.cuh>

namespace pyard::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
// Rows of a tile that a block owns: queries in forward and dq, keys in dk and dv. 16 for each warp.
constexpr int kOwnedRows = kWarps * 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Eight elements beyond the head: rows start an odd number of 16-byte units apart, so that the eight rows of an
// ldmatrix lie in different banks; with float32's pairs likewise.
template <int kHeadDim>
inline constexpr int kStride = kHeadDim + 8;

// Rows of the tile that is streamed past the owned one. Halved where registers would not hold the accumulators.
template <typename T, int kHeadDim>
inline constexpr int kStreamedRows = sizeof(T) == 4 ? 32 : 64;
template <typename T, int kHeadDim>
inline constexpr int kStreamedRowsBackward = sizeof(T) == 4 || kHeadDim > 80 ? 32 : 64;

// Starts copying rows of a [rows, head_dim] matrix; rows and columns beyond it become zeros.
template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void load_tile(T* tile, const T* source, int64_t row_stride, int rows, int head_dim) {
  constexpr int kChunks = kHeadDim / kPerChunk<T>;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kPerChunk<T>;
    const bool inside = row < rows && column < head_dim;
    copy_async(tile + row * kStride<kHeadDim> + column, inside ? source + row * row_stride + column : source, inside);
  }
}

// Writes a warp's 16 rows of accumulators, staged through shared memory so that global memory sees 16-byte accesses.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_rows(T* stage,  // [16, kStride], this warp's own
                                           const float (&rows)[kHeadDim / 8][4], float factor0, float factor1,
                                           T* target, int64_t row_stride, int count, int head_dim) {
  T* place = stage + lane_row() * kStride<kHeadDim> + lane_column();
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    store_pair(place + 8 * n, rows[n][0] * factor0, rows[n][1] * factor0);
    store_pair(place + 8 * n + 8 * kStride<kHeadDim>, rows[n][2] * factor1, rows[n][3] * factor1);
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / kPerChunk<T>;
  for (int i = lane_index(); i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * kPerChunk<T>;
    if (row < count && column < head_dim) {
      write_chunk(target + row * row_stride + column, read_chunk(stage + row * kStride<kHeadDim> + column));
    }
  }
}

// c [16, kColumns] = a [16, kHeadDim] b [kColumns, kHeadDim]^T, both in shared memory.
template <typename T, int kHeadDim, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&c)[kColumns / 8][4], const T* a, const T* b) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
#pragma unroll
  for (int inner = 0; inner < kHeadDim; inner += 16) {
    FragmentA<T> left;
    load(left, a + inner, kStride<kHeadDim>);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      FragmentB<T> right0, right1;
      load(right0, right1, b + n * 8 * kStride<kHeadDim> + inner, kStride<kHeadDim>);
      multiply_add(c[n], left, right0);
      multiply_add(c[n + 1], left, right1);
    }
  }
}

// c [16, kHeadDim] += a [16, kInner] b [kInner, kHeadDim], a in accumulators, b in shared memory.
template <typename T, int kHeadDim, int kInner>
__device__ __forceinline__ void accumulate(float (&c)[kHeadDim / 8][4], const float (&a)[kInner / 8][4], const T* b) {
#pragma unroll
  for (int inner = 0; inner < kInner / 16; ++inner) {
    FragmentA<T> left;
    convert(left, a[2 * inner], a[2 * inner + 1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      FragmentB<T> right0, right1;
      load_transposed(right0, right1, b + inner * 16 * kStride<kHeadDim> + n * 8, kStride<kHeadDim>);
      multiply_add(c[n], left, right0);
      multiply_add(c[n + 1], left, right1);
    }
  }
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>
__device__ __forceinline__ T* head_of(const Heads& tensor, int b, int h) {
  return static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head;
}

__device__ __forceinline__ Seen seen_keys(const Attention& attention, int step) {
  const Seen seen = seen_keys(attention.mask, step);
  return attention.bias == nullptr ? joined(seen) : seen;
}

// Calls run.start<T, kHeadDim>() for the storage type and the head size, padded on chip to one of four.
template <typename T, typename Run>
const char* with_head_dim(int dim, const Run& run) {
  if (dim < 8 || dim > 128 || dim % 8 != 0) return "the head size must be a multiple of 8 from 8 to 128";
  if (dim <= 64) return run.template start<T, 64>();
  if (dim <= 80) return run.template start<T, 80>();
  if (dim <= 96) return run.template start<T, 96>();
  return run.template start<T, 128>();
}

template <typename Run>
const char* with_attention(const Attention& attention, const Run& run) {
  switch (static_cast<Scalar>(attention.scalar)) {
    case Scalar::float32:
      return with_head_dim<float>(attention.head_dim, run);
    case Scalar::bfloat16:
      return with_head_dim<bf16>(attention.head_dim, run);
    case Scalar::float16:
      return with_head_dim<fp16>(attention.head_dim, run);
  }
  return "unknown dtype";
}

}  // namespace pyard::cuda
