// Powers of two in vector registers: range reduction by adding a large number, then a polynomial on [-1/2, 1/2].
#pragma once

#include "vec.h"

namespace pyard::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename A>
struct Exp2;

// Minimax in relative error, which is 2e-9 before rounding.
template <>
struct Exp2<float> {
  using Bits = VecU32;
  static constexpr float kSmallest = -127.0f;  // gives zero: the exponent field of the result is empty
  static constexpr float kRound = 0x1.8p23f;
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kExponentBias = 127;
  static constexpr float kCoefficients[] = {0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f,
                                            0x1.c6aee8p-5f,  0x1.ebfbdcp-3f,  0x1.62e430p-1f};
};

// ln(2)^k / k!: at 1/2 the first term left out is 1e-17.
template <>
struct Exp2<double> {
  using Bits = Vec<uint64_t>;
  static constexpr double kSmallest = -1023.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kExponentBias = 1023;
  static constexpr double kCoefficients[] = {1.3691488853904128e-12, 2.5678435993488205e-11, 4.4455382718708116e-10,
                                             7.0549116208011235e-9,  1.0178086009239699e-7,  1.3215486790144309e-6,
                                             1.5252733804059840e-5,  1.5403530393381610e-4,  1.3333558146428443e-3,
                                             9.6181291076284772e-3,  5.5504108664821580e-2,  2.4022650695910071e-1,
                                             6.9314718055994531e-1};
};

// 2^x for x up to the largest exponent; zero below the smallest, NaN stays NaN.
template <typename A>
inline Vec<A> exp2(Vec<A> x) {
  using E = Exp2<A>;
  using Bits = typename E::Bits;
  x = x < E::kSmallest ? Vec<A>{} + E::kSmallest : x;
  const Vec<A> shifted = x + E::kRound;  // the nearest integer stands in the lowest bits
  const Vec<A> r = x - (shifted - E::kRound);
  Vec<A> power = Vec<A>{} + E::kCoefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(E::kCoefficients) / sizeof(A); ++i) power = power * r + E::kCoefficients[i];
  power = power * r + static_cast<A>(1);
  const Vec<A> scale = (Vec<A>)(((Bits)shifted + E::kExponentBias) << E::kMantissaBits);
  return power * scale;
}

}  // namespace
}  // namespace pyard::cpu
