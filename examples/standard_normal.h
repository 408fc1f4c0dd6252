// The noise of pyard.diffusion.noise.standard_normal, bit for bit: sample i of a seed is the same in Python and here.
//
// Compile with -ffp-contract=off: a fused multiply-add rounds once where Python rounds twice.

#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace pyard {

using Words = std::array<std::uint64_t, 4>;

inline std::uint64_t high_word(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t a_low = a & 0xffffffff, a_high = a >> 32, b_low = b & 0xffffffff, b_high = b >> 32;
  const std::uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
  const std::uint64_t other = a_low * b_high + (middle & 0xffffffff);
  return a_high * b_high + (middle >> 32) + (other >> 32);
}

// Philox 4x64-10 (Salmon et al. 2011) of one counter; the key is (seed, sample index).
inline Words philox(Words counter, std::uint64_t seed, std::uint64_t index) {
  constexpr std::uint64_t m0 = 0xD2E7470EE14C6C93, m1 = 0xCA5A826395121157;
  for (int round = 0; round < 10; ++round) {
    counter = {high_word(m1, counter[2]) ^ counter[1] ^ seed, m1 * counter[2],
               high_word(m0, counter[0]) ^ counter[3] ^ index, m0 * counter[0]};
    seed += 0x9E3779B97F4A7C15;
    index += 0xBB67AE8584CAA73B;
  }
  return counter;
}

template <std::size_t N>
double polynomial(const std::array<double, N>& coefficients, double x) {
  double result = coefficients[N - 1];
  for (std::size_t i = N - 1; i-- > 0;) result = result * x + coefficients[i];
  return result;
}

inline double logarithm(
    double x) {  // log m = 2 artanh((m - 1) / (m + 1)), m the mantissa moved into [sqrt(1/2), sqrt(2))
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.7071067811865476) mantissa *= 2.0, --exponent;
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  std::array<double, 12> series{};
  for (int k = 0; k < 12; ++k) series[k] = 1.0 / (2 * k + 1);
  return exponent * 0.6931471805599453 + 2.0 * s * polynomial(series, s * s);
}

// Wichura 1988, algorithm AS 241, routine PPND16: the x with P(X <= x) = probability.
inline double normal_quantile(double probability) {
  using Table = std::array<double, 8>;
  // clang-format off
  constexpr Table centre_top{3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
  constexpr Table centre_bottom{1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
      2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3};
  constexpr Table tail_top{1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
      1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
  constexpr Table tail_bottom{1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
      1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9};
  constexpr Table far_top{6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
      2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7};
  constexpr Table far_bottom{1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
      7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15};
  // clang-format on
  const double from_centre = probability - 0.5;
  if (std::fabs(from_centre) <= 0.425) {
    const double r = 0.180625 - from_centre * from_centre;
    return from_centre * (polynomial(centre_top, r) / polynomial(centre_bottom, r));
  }
  const double r = std::sqrt(-logarithm(from_centre < 0.0 ? probability : 1.0 - probability));
  const double magnitude = r <= 5.0 ? polynomial(tail_top, r - 1.6) / polynomial(tail_bottom, r - 1.6)
                                    : polynomial(far_top, r - 5.0) / polynomial(far_bottom, r - 5.0);
  return from_centre < 0.0 ? -magnitude : magnitude;
}

// Writes sample `index` of a seed: `size` standard normal numbers.
inline void standard_normal(std::uint64_t seed, std::uint64_t index, float* out, std::size_t size) {
  Words words{};
  for (std::size_t i = 0; i < size; ++i) {
    if (i % 4 == 0) words = philox({i / 4 + 1, 0, 0, 0}, seed, index);  // numpy counts from 1
    out[i] = static_cast<float>(normal_quantile((static_cast<double>(words[i % 4] >> 12) + 0.5) * 0x1p-52));
  }
}

}  // namespace pyard
