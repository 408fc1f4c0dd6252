// Rows of D elements held in the registers of a few warps.
#pragma once

#include <launchers.h>

#include <machine.cuh>

namespace pyard::cuda {

// kWarps warps hold a row, each lane kPieces pieces of it, kValues elements each; kGroups rows are held by a block at a
// time. Stream: what the residual stream is stored in. Branch: what all else is, the same or a narrower one.
template <typename Stream_, typename Branch_, int kWarps_, int kPieces_>
struct RowShape {
  using Stream = Stream_;
  using Branch = Branch_;
  static constexpr bool kMixed = sizeof(Stream) != sizeof(Branch);
  static constexpr int kWarps = kWarps_;
  static constexpr int kPieces = kPieces_;
  static constexpr int kGroups = kWarps < 4 ? 4 / kWarps : 1;
  static constexpr int kThreads = kWarps * kGroups * 32;
  static constexpr int kValues = kPerChunk<Branch>;

  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / (kWarps * 32); }
  // First element of this lane's piece i: neighbouring lanes read neighbouring pieces.
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

// kValues neighbours of a row, as they are stored: a chunk, or of a float32 stream beside 16 bits two.
template <typename T, int kValues>
struct Piece {
  Chunk chunks[kValues / kPerChunk<T>];
};

// A piece that begins beyond the row is zeros: dim is a multiple of kValues.
template <int kValues, typename T>
__device__ __forceinline__ Piece<T, kValues> load_piece(const T* row, int column, int dim) {
  Piece<T, kValues> piece;
#pragma unroll
  for (int i = 0; i < kValues / kPerChunk<T>; ++i) piece.chunks[i] = load_chunk(row + i * kPerChunk<T>, column, dim);
  return piece;
}

template <typename T, int kValues>
__device__ __forceinline__ void store_piece(T* row, int column, int dim, const Piece<T, kValues>& piece) {
#pragma unroll
  for (int i = 0; i < kValues / kPerChunk<T>; ++i) store_chunk(row + i * kPerChunk<T>, column, dim, piece.chunks[i]);
}

template <typename T, int kValues>
__device__ __forceinline__ void unpack(float (&values)[kValues], const Piece<T, kValues>& piece) {
  if constexpr (kValues == kPerChunk<T>) {
    unpack(values, piece.chunks[0], T{});
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = float_of_bits(piece.chunks[i / 4].words[i % 4]);
  }
}

template <typename T, int kValues>
__device__ __forceinline__ Piece<T, kValues> pack_piece(const float (&values)[kValues]) {
  Piece<T, kValues> piece;
  if constexpr (kValues == kPerChunk<T>) {
    piece.chunks[0] = pack_chunk(values, T{});
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) piece.chunks[i / 4].words[i % 4] = bits_of_float(values[i]);
  }
  return piece;
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
__device__ __forceinline__ void moments(const Piece<typename Shape::Stream, Shape::kValues> (&row)[Shape::kPieces],
                                        int dim, float eps, RowSum<Shape>& row_sum, float& mean, float& rstd) {
  float sum = 0.0f;
  float values[Shape::kValues];
#pragma unroll
  for (int i = 0; i < Shape::kPieces; ++i) {
    unpack(values, row[i]);  // pieces beyond the row are zero
#pragma unroll
    for (int j = 0; j < Shape::kValues; ++j) sum += values[j];
  }
  mean = row_sum(sum) / static_cast<float>(dim);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kPieces; ++i) {
    unpack(values, row[i]);
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
template <typename Stream, typename Branch, typename Run>
const char* with_row_shape(int dim, const Run& run) {
  const int pieces = dim / kPerChunk<Branch>;
  if (dim < 1 || dim > 8192 || dim % kPerChunk<Branch> != 0) {
    return "the hidden size must be a multiple of 16 bytes and at most 8192";
  }
  if (pieces <= 64) return run(RowShape<Stream, Branch, 1, 2>{});
  if constexpr (sizeof(Stream) != sizeof(Branch)) {
    // A piece of the stream takes twice the registers.
    if (pieces <= 160) return run(RowShape<Stream, Branch, 5, 1>{});
    if (pieces <= 512) return run(RowShape<Stream, Branch, 8, 2>{});
    return run(RowShape<Stream, Branch, 8, 4>{});
  } else {
    if (pieces <= 192) return run(RowShape<Stream, Branch, 2, 3>{});
    if (pieces <= 512) return run(RowShape<Stream, Branch, 4, 4>{});
    if constexpr (sizeof(Stream) == 4) {
      return run(RowShape<Stream, Branch, 8, 8>{});
    } else {
      return run(RowShape<Stream, Branch, 16, 2>{});
    }
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

// Calls run with the types of the stream and of all else: the same, or float32 and 16 bits.
template <typename Run>
const char* with_scalars(int stream, int narrow, const Run& run) {
  if (narrow == 0) return with_scalar(stream, [&](auto scalar) { return run(scalar, scalar); });
  if (static_cast<Scalar>(stream) != Scalar::float32) return "only beside float32 may there be another dtype";
  return static_cast<Scalar>(narrow) == Scalar::bfloat16 ? run(float{}, bf16{}) : run(float{}, fp16{});
}

}  // namespace pyard::cuda
