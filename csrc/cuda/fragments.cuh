// Tensor-core operands: what each lane of a warp holds of a 16 x 16 or 16 x 8 matrix (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"), loaded from shared memory with row stride `stride`. With g = lane / 4 and t = lane % 4, an
// accumulator holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
//
// float32 goes through TF32 units as hi * hi + hi * lo + lo * hi, which keeps its digits. Its 16 values of the inner
// dimension are dealt to two 8-deep instructions so that every lane holds the same places as in 16-bit types.
#pragma once

#include <machine.cuh>

namespace pyard::cuda {

template <typename T>
struct FragmentA {
  uint32_t r[4];
};

template <>
struct FragmentA<float> {
  float r[8];
};

template <typename T>
struct FragmentB {
  uint32_t r[2];
};

template <>
struct FragmentB<float> {
  float r[4];
};

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int lane_row() { return lane_index() / 4; }         // g
__device__ __forceinline__ int lane_column() { return lane_index() % 4 * 2; }  // 2t

// From [row][inner].
template <typename T>
__device__ __forceinline__ void load(FragmentA<T>& a, const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices(a.r, tile + lane % 16 * stride + lane / 16 * 8);
}

__device__ __forceinline__ void load(FragmentA<float>& a, const float* tile, int stride) {
  const float* at = tile + lane_row() * stride + lane_column();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* place = at + i % 2 * 8 * stride + i / 2 * 8;
    a.r[2 * i] = place[0];
    a.r[2 * i + 1] = place[1];
  }
}

// From [inner][row].
template <typename T>
__device__ __forceinline__ void load_transposed(FragmentA<T>& a, const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices_transposed(a.r, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

__device__ __forceinline__ void load_transposed(FragmentA<float>& a, const float* tile, int stride) {
  const float* at = tile + lane_column() * stride + lane_row();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* place = at + i / 2 * 8 * stride + i % 2 * 8;
    a.r[2 * i] = place[0];
    a.r[2 * i + 1] = place[stride];
  }
}

// Two neighbouring 16 x 8 operands from [column][inner].
template <typename T>
__device__ __forceinline__ void load(FragmentB<T>& b0, FragmentB<T>& b1, const T* tile, int stride) {
  const int lane = lane_index();
  uint32_t r[4];
  load_matrices(r, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  b0.r[0] = r[0], b0.r[1] = r[1], b1.r[0] = r[2], b1.r[1] = r[3];
}

__device__ __forceinline__ void load(FragmentB<float>& b0, FragmentB<float>& b1, const float* tile, int stride) {
  const float* at = tile + lane_row() * stride + lane_column();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int offset = i / 2 * 8 + i % 2;
    b0.r[i] = at[offset];
    b1.r[i] = at[8 * stride + offset];
  }
}

// Two neighbouring 16 x 8 operands from [inner][column].
template <typename T>
__device__ __forceinline__ void load_transposed(FragmentB<T>& b0, FragmentB<T>& b1, const T* tile, int stride) {
  const int lane = lane_index();
  uint32_t r[4];
  load_matrices_transposed(r, tile + lane % 16 * stride + lane / 16 * 8);
  b0.r[0] = r[0], b0.r[1] = r[1], b1.r[0] = r[2], b1.r[1] = r[3];
}

__device__ __forceinline__ void load_transposed(FragmentB<float>& b0, FragmentB<float>& b1, const float* tile,
                                                int stride) {
  const float* at = tile + lane_column() * stride + lane_row();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int offset = (i / 2 * 8 + i % 2) * stride;
    b0.r[i] = at[offset];
    b1.r[i] = at[offset + 8];
  }
}

// Two neighbouring accumulators as the left operand of the next product.
template <typename T>
__device__ __forceinline__ void convert(FragmentA<T>& a, const float (&low)[4], const float (&high)[4]) {
  a.r[0] = pack(low[0], low[1], T{}), a.r[1] = pack(low[2], low[3], T{});
  a.r[2] = pack(high[0], high[1], T{}), a.r[3] = pack(high[2], high[3], T{});
}

__device__ __forceinline__ void convert(FragmentA<float>& a, const float (&low)[4], const float (&high)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.r[i] = low[i], a.r[4 + i] = high[i];
}

// Two neighbours of a row into shared memory.
template <typename T>
__device__ __forceinline__ void store_pair(T* place, float first, float second) {
  *reinterpret_cast<uint32_t*>(place) = pack(first, second, T{});
}

__device__ __forceinline__ void store_pair(float* place, float first, float second) {
  place[0] = first, place[1] = second;
}

// c += a b.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  multiply_add(c, a.r, b.r, T{});
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const FragmentA<float>& a, const FragmentB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = a.r[4 * half + i % 2 * 2 + i / 2];
      a_high[i] = to_tf32(x);
      a_low[i] = to_tf32(x - float_of_bits(a_high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = b.r[2 * half + i];
      b_high[i] = to_tf32(x);
      b_low[i] = to_tf32(x - float_of_bits(b_high[i]));
    }
    multiply_add_tf32(c, a_low, b_high);
    multiply_add_tf32(c, a_high, b_low);
    multiply_add_tf32(c, a_high, b_high);
  }
}

}  // namespace pyard::cuda
