// Vectors of the width of the instruction set this file is compiled for (GCC and Clang vector extensions), and loads
// and stores that convert from the storage types.
//
// Only kernel files include this, and they include nothing of torch or the standard library's templates: an inline
// function compiled here for AVX-512 must never become the copy that the linker keeps for everybody. For the same
// reason everything is in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pyard::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a storage type is accumulated in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

using VecU32 = Vec<uint32_t>;
typedef uint16_t HalfVecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <typename A>
inline A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += v[lane];
  return sum;
}

inline Vec<float> from_bits(HalfVecU16 bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, VecU32) << 16);
}

// Round to nearest even; a NaN stays one (the carry of the rounding could make it an infinity).
inline HalfVecU16 to_bits(Vec<float> v, BFloat16) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 nan = (bits >> 16) | 0x40u;
  const VecU32 is_nan = (VecU32)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), HalfVecU16);
}

#if defined(__AVX512F__)
// The masked forms: GCC 12 warns about an uninitialised value inside the plain ones.
inline Vec<float> from_bits(HalfVecU16 bits, Float16) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
inline HalfVecU16 to_bits(Vec<float> v, Float16) {
  return (HalfVecU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline Vec<float> from_bits(HalfVecU16 bits, Float16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
inline HalfVecU16 to_bits(Vec<float> v, Float16) {
  return (HalfVecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Without F16C: shift exponent and mantissa into place and rescale by 2^112, which also normalises subnormals.
inline Vec<float> from_bits(HalfVecU16 half, Float16) {
  const VecU32 bits = __builtin_convertvector(half, VecU32);
  const VecU32 magnitude = (bits & 0x7fffu) << 13;
  const VecU32 special = (VecU32)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  return (Vec<float>)((VecU32)scaled | special | ((bits & 0x8000u) << 16));
}

inline HalfVecU16 to_bits(Vec<float> v, Float16) {
  const VecU32 bits = (VecU32)v;
  const VecU32 magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent and round to nearest even in the 13 bits that are dropped.
  const VecU32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 aligns the mantissa so that the addition itself rounds to nearest even.
  const VecU32 subnormal = (VecU32)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const VecU32 is_subnormal = (VecU32)(magnitude < (113u << 23));
  const VecU32 is_large = (VecU32)(magnitude >= 0x477ff000u);
  const VecU32 is_nan = (VecU32)(magnitude > 0x7f800000u);
  VecU32 result = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  result = (result & ~is_large) | (0x7c00u & is_large);
  result |= 0x200u & is_nan;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), HalfVecU16);
}
#endif

// How much of a vector is inside the row: all of it, or the first `count` lanes at the row's end.
struct Full {};
struct Partial {
  int count;
};

template <typename T>
inline Vec<Accumulator<T>> load(const T* p, Full) {
  if constexpr (sizeof(T) == 2) {
    HalfVecU16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return from_bits(bits, T{});
  } else {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <typename T>
inline Vec<Accumulator<T>> load(const T* p, Partial part) {
  T padded[kLanes<Accumulator<T>>] = {};
  std::memcpy(padded, p, static_cast<size_t>(part.count) * sizeof(T));
  return load(padded, Full{});
}

template <typename T>
inline void store(T* p, Vec<Accumulator<T>> v, Full) {
  if constexpr (sizeof(T) == 2) {
    const HalfVecU16 bits = to_bits(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

template <typename T>
inline void store(T* p, Vec<Accumulator<T>> v, Partial part) {
  T padded[kLanes<Accumulator<T>>];
  store(padded, v, Full{});
  std::memcpy(p, padded, static_cast<size_t>(part.count) * sizeof(T));
}

// Calls body(i, Full or Partial) for every vector that starts at element i of [0, size).
template <typename A, typename Body>
inline void for_each_vector(int64_t size, const Body& body) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) body(i, Full{});
  if (i < size) body(i, Partial{static_cast<int>(size - i)});
}

// The sum of value(i, Full or Partial) over [0, size), lanes beyond the end left out.
template <typename A, typename Value>
inline A sum_over(int64_t size, const Value& value) {
  constexpr int lanes = kLanes<A>;
  Vec<A> total[4] = {};  // four chains, since one would wait for the latency of each addition
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes) {
    for (int chain = 0; chain < 4; ++chain) total[chain] += value(i + chain * lanes, Full{});
  }
  for (; i + lanes <= size; i += lanes) total[0] += value(i, Full{});
  A sum = 0;
  if (i < size) {
    const int rest = static_cast<int>(size - i);
    const Vec<A> last = value(i, Partial{rest});
    for (int lane = 0; lane < rest; ++lane) sum += last[lane];
  }
  return sum + sum_of_lanes<A>((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace
}  // namespace pyard::cpu
