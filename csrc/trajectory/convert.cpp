#include "trajectory/convert.h"

#include <cstring>

namespace pyard::trajectory {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Branches are selections below, so that compilers vectorize the loops that these are inlined into.

uint32_t float_from_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  // Moved into place, the exponent is 112 too small; a multiplication repairs it and normalizes subnormals exactly.
  const float scaled = float_of(magnitude) * 0x1p112f;
  const uint32_t special = scaled >= 65536.0f ? 0x7F800000u : 0u;  // infinity, NaN
  return (bits_of(scaled) | special) | static_cast<uint32_t>(half & 0x8000) << 16;
}

uint16_t half_from_float(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  // Subnormal halves: adding 1/2 leaves the rounded multiple of 2^-24 in the lowest bits.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t odd = magnitude >> 13 & 1;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + odd) >> 13;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < (113u << 23) ? small : normal;
  return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
}

uint32_t float_from_bfloat(uint16_t value) { return static_cast<uint32_t>(value) << 16; }

uint16_t bfloat_from_float(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0u : rounded);
}

template <typename From, typename To, To (*one)(From)>
void convert(const uint8_t* source, uint8_t* target, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    From from;
    std::memcpy(&from, source + i * sizeof(From), sizeof(From));
    const To to = one(from);
    std::memcpy(target + i * sizeof(To), &to, sizeof(To));
  }
}

template <size_t bytes>
void copy(const uint8_t* source, uint8_t* target, size_t count) {
  std::memcpy(target, source, count * bytes);
}

}  // namespace

Convert converter(DType from, DType to) {
  if (from == to && from != DType::kInt64) return bytes_of(from) == 4 ? copy<4> : copy<2>;
  if (to == DType::kFloat32) {
    if (from == DType::kFloat16) return convert<uint16_t, uint32_t, float_from_half>;
    if (from == DType::kBFloat16) return convert<uint16_t, uint32_t, float_from_bfloat>;
  }
  if (from == DType::kFloat32) {
    if (to == DType::kFloat16) return convert<uint32_t, uint16_t, half_from_float>;
    if (to == DType::kBFloat16) return convert<uint32_t, uint16_t, bfloat_from_float>;
  }
  throw InputError("cannot convert " + std::string(name_of(from)) + " to " + std::string(name_of(to)));
}

}  // namespace pyard::trajectory
