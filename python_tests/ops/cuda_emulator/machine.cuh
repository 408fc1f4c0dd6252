// The kernels' machine, on one CPU thread: stands in for csrc/cuda/ptx/machine.cuh when the tests compile the kernels
// as plain C++. Every CUDA thread is a fiber that runs until it meets the others: at a barrier of its block or at an
// instruction of its whole warp. What a GPU would leave undefined is made to fail: shared memory starts as NaN, an
// asynchronous copy lands as late as it may (its target is NaN until then), blocks, warps and the lanes of a warp run
// in drawn orders, warps as far ahead of one another as the barriers let them or in turns, and lanes that meet at
// different instructions abort.
#pragma once

#include <scalars.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

extern dim3 thread_index, block_index, grid_size, block_size;
extern char* dynamic_shared_memory;
extern int most_shared_bytes;  // of a block

// Gives `mine` to the warp, waits for its 32 lanes, runs `together` once on all 32 and takes this lane's result.
void with_warp(const void* instruction, const void* mine, void* result,
               void (*together)(const void* const* inputs, void* const* results));
void warp_barrier();
void block_barrier();
void copy_async(void* shared, const void* global, bool inside);
void copy_async_commit();
void copy_async_wait();
void run_block(const std::function<void()>& thread, int threads);
void begin_launch(dim3 grid, int threads, int shared_bytes);
std::vector<unsigned> drawn_blocks(dim3 grid);

}  // namespace emulator

#define threadIdx (::emulator::thread_index)
#define blockIdx (::emulator::block_index)
#define gridDim (::emulator::grid_size)
#define blockDim (::emulator::block_size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::warp_barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  struct Input {
    float value;
    int distance;
  } mine{value, distance};
  float result;
  emulator::with_warp("shuffle", &mine, &result, [](const void* const* inputs, void* const* results) {
    for (int lane = 0; lane < 32; ++lane) {
      const int distance_of_lane = static_cast<const Input*>(inputs[lane])->distance;
      *static_cast<float*>(results[lane]) = static_cast<const Input*>(inputs[lane ^ distance_of_lane])->value;
    }
  });
  return result;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// What benchmarks/gpu_sanitize.cu asks of CUDA's runtime.
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

namespace pyard::cuda {

void check_row_address(const void* row);  // of 16 bytes

inline Chunk read_chunk(const void* place) {
  check_row_address(place);
  return *static_cast<const Chunk*>(place);
}
inline void write_chunk(void* place, const Chunk& chunk) {
  check_row_address(place);
  *static_cast<Chunk*>(place) = chunk;
}

inline char* dynamic_shared() { return emulator::dynamic_shared_memory; }
inline void copy_async(void* shared, const void* global, bool inside) { emulator::copy_async(shared, global, inside); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
inline void copy_async_wait() { emulator::copy_async_wait(); }

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u;
  const uint32_t mantissa = x.bits & 1023u;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa | 1024u), static_cast<int>(exponent) - 25);
  return sign != 0 ? -size : size;
}

inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of_float(x);
  if (std::isnan(x)) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t round_to_fp16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000u : 0u;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fffu;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  int exponent;
  std::frexp(size, &exponent);
  if (size < std::ldexp(1.0f, -14)) exponent = -13;
  // Units of the last place, rounded to even; a carry moves into the exponent by itself.
  const float units = std::nearbyint(std::ldexp(size, 11 - exponent));
  const int code = static_cast<int>(units) + (size < std::ldexp(1.0f, -14) ? 0 : (exponent + 13) * 1024);
  return static_cast<uint16_t>(sign | code);
}
inline uint32_t pack(float low, float high, bf16) {
  return round_to_bf16(low) | static_cast<uint32_t>(round_to_bf16(high)) << 16;
}
inline uint32_t pack(float low, float high, fp16) {
  return round_to_fp16(low) | static_cast<uint32_t>(round_to_fp16(high)) << 16;
}

struct MatrixRow {
  uint16_t elements[8];
};

// PTX ISA, ldmatrix: lane l receives of matrix i the pair at row l / 4, columns 2 (l % 4) and the next. Every lane
// reads the row that it points at.
template <bool kTransposed>
void load_matrices_together(const void* const* inputs, void* const* results) {
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* r = static_cast<uint32_t*>(results[lane]);
    for (int i = 0; i < 4; ++i) {
      uint32_t pair = 0;
      for (int j = 0; j < 2; ++j) {
        const int row = kTransposed ? lane % 4 * 2 + j : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + j;
        const MatrixRow& start = *static_cast<const MatrixRow*>(inputs[8 * i + row]);
        pair |= static_cast<uint32_t>(start.elements[column]) << 16 * j;
      }
      r[i] = pair;
    }
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  check_row_address(row);
  MatrixRow mine;
  std::memcpy(&mine, row, sizeof mine);
  emulator::with_warp("ldmatrix", &mine, r, load_matrices_together<false>);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  check_row_address(row);
  MatrixRow mine;
  std::memcpy(&mine, row, sizeof mine);
  emulator::with_warp("ldmatrix.trans", &mine, r, load_matrices_together<true>);
}

struct MultiplyInput {
  float c[4];
  uint32_t a[4], b[2];
};

// PTX ISA, matrix fragments for mma.m16n8k16 with 16-bit operands.
template <typename T>
void multiply_add_together(const void* const* inputs, void* const* results) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyInput& in = *static_cast<const MultiplyInput*>(inputs[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {
      const T value{static_cast<uint16_t>(in.a[i / 2] >> 16 * (i % 2))};
      a[group + (i / 2 % 2 == 0 ? 0 : 8)][pair + i % 2 + (i < 4 ? 0 : 8)] = to_float(value);
    }
    for (int i = 0; i < 4; ++i) {
      const T value{static_cast<uint16_t>(in.b[i / 2] >> 16 * (i % 2))};
      b[pair + i % 2 + (i < 2 ? 0 : 8)][group] = to_float(value);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyInput& in = *static_cast<const MultiplyInput*>(inputs[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      float sum = in.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(results[lane])[i] = sum;
    }
  }
}
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  MultiplyInput mine;
  std::memcpy(mine.c, c, sizeof c), std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b);
  emulator::with_warp("mma", &mine, c, multiply_add_together<T>);
}

// PTX ISA, matrix fragments for mma.m16n8k8 with .tf32 operands.
inline void multiply_add_tf32_together(const void* const* inputs, void* const* results) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyInput& in = *static_cast<const MultiplyInput*>(inputs[lane]);
    const int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][place + i / 2 * 4] = float_of_bits(in.a[i]);
    for (int i = 0; i < 2; ++i) b[place + i * 4][group] = float_of_bits(in.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyInput& in = *static_cast<const MultiplyInput*>(inputs[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = in.c[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(results[lane])[i] = sum;
    }
  }
}
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MultiplyInput mine;
  std::memcpy(mine.c, c, sizeof c), std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b);
  emulator::with_warp("mma.tf32", &mine, c, multiply_add_tf32_together);
}

// To nearest, ties away from zero, 10 bits of mantissa kept.
inline uint32_t to_tf32(float x) {
  return std::isfinite(x) ? (bits_of_float(x) + 0x1000u) & ~0x1fffu : bits_of_float(x);
}
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }
inline void add_atomically(float* sums, float a, float b) { sums[0] += a, sums[1] += b; }

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void*,
                   const Arguments& arguments) {
  if (shared_bytes > emulator::most_shared_bytes) return "more shared memory than the device has";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  emulator::begin_launch(grid, threads, shared_bytes);
  for (const unsigned block : emulator::drawn_blocks(grid)) {
    emulator::block_index = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    emulator::run_block([&] { kernel(arguments); }, threads);
  }
  return nullptr;
}

}  // namespace pyard::cuda
