// gelu_tanh and its backward. With z = x + bias and u = sqrt(2 / pi) (z + 0.044715 z^3), (1 + tanh u) / 2 is
// s = 1 / (1 + e^-2u), so that
//   out = z s,   dx = grad (s + z s (1 - s) 2 du/dz),   dbias = sum over rows of dx.
// A thread keeps 16 bytes of columns and goes down the rows. A block sums the rows of a part; a second kernel adds the
// parts in order, so that dbias has the same bits in every run.
#include <rows.cuh>

namespace pyard::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsForward = 8;
constexpr int kRowsOfPart = 64;
constexpr int64_t kMostParts = 1024;
constexpr int kColumnsOfSum = 32;
constexpr int kGroupsOfSum = 8;

constexpr float kCubic = 0.044715f;
constexpr float kRate = 0.7978845608028654f;                   // sqrt(2 / pi)
constexpr float kDecay = -2.0f * kRate * 1.4426950408889634f;  // of e^-2u, in base 2

__device__ __forceinline__ float gelu(float z) {
  return z * reciprocal_approximate(1.0f + exp2_approximate(kDecay * (z + kCubic * z * z * z)));
}

__device__ __forceinline__ float gelu_slope(float z) {
  // Beyond these the slope is 0 or 1 in float32, and infinities must not meet zeros. A NaN passes.
  const float near = z < -30.0f ? -30.0f : z > 30.0f ? 30.0f : z;
  const float exponent = kDecay * (near + kCubic * near * near * near);
  const float decay = exp2_approximate(exponent > 80.0f ? 80.0f : exponent);
  const float s = reciprocal_approximate(1.0f + decay);
  return s + near * s * (decay * s) * (2.0f * kRate) * (1.0f + 3.0f * kCubic * near * near);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Gelu arguments) {
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kPerChunk<T>;
  if (column >= arguments.dim) return;
  float bias[kPerChunk<T>];
  unpack(bias, read_chunk(static_cast<const T*>(arguments.bias) + column), T{});
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsForward;
#pragma unroll 4
  for (int r = 0; r < kRowsForward; ++r) {
    if (first + r >= arguments.rows) break;
    const int64_t place = (first + r) * arguments.dim + column;
    float values[kPerChunk<T>];
    unpack(values, read_chunk(static_cast<const T*>(arguments.x) + place), T{});
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) values[i] = gelu(values[i] + bias[i]);
    write_chunk(static_cast<T*>(arguments.out) + place, pack_chunk(values, T{}));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Gelu arguments) {
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kPerChunk<T>;
  if (column >= arguments.dim) return;
  float bias[kPerChunk<T>], sums[kPerChunk<T>] = {};
  unpack(bias, read_chunk(static_cast<const T*>(arguments.bias) + column), T{});
  const int64_t rows_of_part = (arguments.rows + arguments.parts - 1) / arguments.parts;
  const int64_t first = blockIdx.x * rows_of_part;
  const int64_t end = first + rows_of_part < arguments.rows ? first + rows_of_part : arguments.rows;
#pragma unroll 4
  for (int64_t row = first; row < end; ++row) {
    const int64_t place = row * arguments.dim + column;
    float values[kPerChunk<T>], grads[kPerChunk<T>];
    unpack(values, read_chunk(static_cast<const T*>(arguments.x) + place), T{});
    unpack(grads, read_chunk(static_cast<const T*>(arguments.grad) + place), T{});
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      grads[i] *= gelu_slope(values[i] + bias[i]);
      sums[i] += grads[i];
    }
    write_chunk(static_cast<T*>(arguments.out) + place, pack_chunk(grads, T{}));
  }
  float* part = arguments.partial + static_cast<int64_t>(blockIdx.x) * arguments.dim + column;
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; i += 4) {
    const float four[4] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    write_chunk(part + i, pack_chunk(four, float{}));
  }
}

template <typename T>
__global__ void __launch_bounds__(kColumnsOfSum* kGroupsOfSum) sum_kernel(const Gelu arguments) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [kGroupsOfSum, kColumnsOfSum]
  const int lane = static_cast<int>(threadIdx.x) % kColumnsOfSum;
  const int group = static_cast<int>(threadIdx.x) / kColumnsOfSum;
  const int column = static_cast<int>(blockIdx.x) * kColumnsOfSum + lane;
  float sum = 0.0f;
  if (column < arguments.dim) {
#pragma unroll 4
    for (int i = group; i < arguments.parts; i += kGroupsOfSum) {
      sum += arguments.partial[static_cast<int64_t>(i) * arguments.dim + column];
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || column >= arguments.dim) return;
  for (int i = 1; i < kGroupsOfSum; ++i) sum += shared[i * kColumnsOfSum + lane];
  store_scalar(static_cast<T*>(arguments.dbias) + column, sum);
}

const char* obstacle(const Gelu& arguments) {
  const int bytes = static_cast<Scalar>(arguments.scalar) == Scalar::float32 ? 4 : 2;
  if (arguments.dim < 1 || arguments.dim > 1 << 24 || arguments.dim * bytes % 16 != 0) {
    return "the number of columns must be a multiple of 16 bytes and at most 2^24";
  }
  return arguments.rows > int64_t{1} << 33 ? "more than 2^33 rows in one call" : nullptr;
}

template <typename T>
unsigned column_blocks(const Gelu& arguments) {
  return static_cast<unsigned>(divide_up(arguments.dim, kThreads * kPerChunk<T>));
}

}  // namespace

extern "C" int pyard_cuda_gelu_parts(int64_t rows) {
  const int64_t parts = (rows + kRowsOfPart - 1) / kRowsOfPart;
  return static_cast<int>(parts < kMostParts ? parts : kMostParts);
}

extern "C" const char* pyard_cuda_gelu_forward(const Gelu* arguments, void* stream) {
  if (const char* error = obstacle(*arguments)) return error;
  return with_scalar(arguments->scalar, [&](auto scalar) {
    using T = decltype(scalar);
    const dim3 grid(static_cast<unsigned>((arguments->rows + kRowsForward - 1) / kRowsForward),
                    column_blocks<T>(*arguments));
    return launch(forward_kernel<T>, grid, kThreads, 0, stream, *arguments);
  });
}

extern "C" const char* pyard_cuda_gelu_backward(const Gelu* arguments, void* stream) {
  if (const char* error = obstacle(*arguments)) return error;
  return with_scalar(arguments->scalar, [&](auto scalar) {
    using T = decltype(scalar);
    const dim3 parts(static_cast<unsigned>(arguments->parts), column_blocks<T>(*arguments));
    const char* error = launch(backward_kernel<T>, parts, kThreads, 0, stream, *arguments);
    if (error != nullptr) return error;
    const dim3 columns(static_cast<unsigned>(divide_up(arguments->dim, kColumnsOfSum)));
    constexpr int kSumThreads = kColumnsOfSum * kGroupsOfSum;
    return launch(sum_kernel<T>, columns, kSumThreads, kSumThreads * 4, stream, *arguments);
  });
}

}  // namespace pyard::cuda
