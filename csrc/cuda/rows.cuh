// Rows of D elements held in the registers of a few warps.
#pragma once

#include <launchers.h>

#include <machine.cuh>

namespace pyard::cuda {

// kWarps warps hold a row, each lane kChunks chunks of 16 bytes of it; kGroups rows are held by a block at a time.
template <typename T_, int kWarps_, int kChunks_>
struct RowShape {
  using T = T_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kGroups = kWarps < 4 ? 4 / kWarps : 1;
  static constexpr int kThreads = kWarps * kGroups * 32;
  static constexpr int kValues = kPerChunk<T>;

  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / (kWarps * 32); }
  // First element of this lane's chunk i: neighbouring lanes read neighbouring chunks.
  static __device__ __forceinline__ int column(int i) {
    return (i * kWarps * 32 + static_cast<int>(threadIdx.x) % (kWarps * 32)) * kValues;
  }
};

template <typename T>
__device__ __forceinline__ Chunk load_chunk(const T* row, int column, int dim) {
  return column < dim ? read_chunk(row + column) : Chunk{{0, 0, 0, 0}};
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* row, int column, int dim, const Chunk& chunk) {
  if (column < dim) write_chunk(row + column, chunk);
}

template <typename T>
__device__ __forceinline__ void unpack(float (&values)[kPerChunk<T>], const Chunk& chunk, T) {
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) {
    values[i] = to_float(T{static_cast<uint16_t>(chunk.words[i / 2] >> 16 * (i % 2))});
  }
}
__device__ __forceinline__ void unpack(float (&values)[4], const Chunk& chunk, float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = float_of_bits(chunk.words[i]);
}

template <typename T>
__device__ __forceinline__ Chunk pack_chunk(const float (&values)[kPerChunk<T>], T) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.words[i] = pack(values[2 * i], values[2 * i + 1], T{});
  return chunk;
}
__device__ __forceinline__ Chunk pack_chunk(const float (&values)[4], float) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.words[i] = bits_of_float(values[i]);
  return chunk;
}

template <typename T>
__device__ __forceinline__ void store_scalar(T* place, float value) {
  place->bits = static_cast<uint16_t>(pack(value, 0.0f, T{}));
}
__device__ __forceinline__ void store_scalar(float* place, float value) { *place = value; }

// Sums over a row. Every thread of the block takes part in every call.
template <typename Shape>
class RowSum {
 public:
  explicit __device__ RowSum(float* parts) : parts_(parts) {}  // [2, kGroups, kWarps, 2] in shared memory

  // Both arguments become their sums over the row.
  __device__ __forceinline__ void operator()(float& a, float& b) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, distance);
      b += __shfl_xor_sync(0xffffffffu, b, distance);
    }
    if constexpr (Shape::kWarps > 1) {
      // Two places in turn: a warp may enter the next sum while another still reads this one.
      float* place = parts_ + turn_ * Shape::kGroups * Shape::kWarps * 2 + Shape::group() * Shape::kWarps * 2;
      turn_ = 1 - turn_;
      const int warp = static_cast<int>(threadIdx.x) / 32 % Shape::kWarps;
      if (threadIdx.x % 32 == 0) place[2 * warp] = a, place[2 * warp + 1] = b;
      __syncthreads();
      a = b = 0.0f;
#pragma unroll
      for (int i = 0; i < Shape::kWarps; ++i) a += place[2 * i], b += place[2 * i + 1];
    }
  }
  __device__ __forceinline__ float operator()(float a) {
    float unused = 0.0f;
    (*this)(a, unused);
    return a;
  }

 private:
  float* parts_;
  int turn_ = 0;
};

// mean and 1 / sqrt(variance + eps) of a row held in registers. Two passes: E[x^2] - E[x]^2 would cancel far from zero.
template <typename Shape>
__device__ __forceinline__ void moments(const Chunk (&row)[Shape::kChunks], int dim, float eps, RowSum<Shape>& row_sum,
                                        float& mean, float& rstd) {
  typename Shape::T scalar{};
  float sum = 0.0f;
  float values[Shape::kValues];
#pragma unroll
  for (int i = 0; i < Shape::kChunks; ++i) {
    unpack(values, row[i], scalar);  // chunks beyond the row are zero
#pragma unroll
    for (int j = 0; j < Shape::kValues; ++j) sum += values[j];
  }
  mean = row_sum(sum) / static_cast<float>(dim);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kChunks; ++i) {
    unpack(values, row[i], scalar);
#pragma unroll
    for (int j = 0; j < Shape::kValues; ++j) {
      const float centred = Shape::column(i) < dim ? values[j] - mean : 0.0f;
      squares += centred * centred;
    }
  }
  rstd = rsqrtf(row_sum(squares) / static_cast<float>(dim) + eps);
}

template <typename T>
__device__ __forceinline__ T* row_of(const Tokens& tensor, int b, int s, int t) {
  return static_cast<T*>(tensor.data) + b * tensor.batch + s * tensor.step + t * tensor.token;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const PerStep& tensor, int b, int s) {
  return static_cast<const T*>(tensor.data) + b * tensor.batch + s * tensor.step;
}

// Calls run with the narrowest RowShape that holds rows of `dim` elements.
template <typename T, typename Run>
const char* with_row_shape(int dim, const Run& run) {
  const int chunks = dim / kPerChunk<T>;
  if (dim < 1 || dim > 8192 || dim % kPerChunk<T> != 0) {
    return "the hidden size must be a multiple of 16 bytes and at most 8192";
  }
  if (chunks <= 64) return run(RowShape<T, 1, 2>{});
  if (chunks <= 192) return run(RowShape<T, 2, 3>{});
  if (chunks <= 512) return run(RowShape<T, 4, 4>{});
  if constexpr (sizeof(T) == 4) {
    return run(RowShape<T, 8, 8>{});
  } else {
    return run(RowShape<T, 16, 2>{});
  }
}

template <typename Run>
const char* with_scalar(int scalar, const Run& run) {
  switch (static_cast<Scalar>(scalar)) {
    case Scalar::float32:
      return run(float{});
    case Scalar::bfloat16:
      return run(bf16{});
    case Scalar::float16:
      return run(fp16{});
  }
  return "unknown dtype";
}

}  // namespace pyard::cuda
