// The tanh form of GELU (Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2) of x + bias.
// With u = sqrt(2 / pi) (z + 0.044715 z^3), (1 + tanh(u)) / 2 is 1 / (1 + e) for e = exp(-2u): one exponential and one
// division, and small results keep their digits. Compiled once per instruction set.
#include "gelu_tanh.h"

#include "exp2.h"
#include "vec.h"

namespace pyard::cpu {
namespace {

constexpr double kCubic = 0.044715;
constexpr double kSlope = -2.0 * 0.7978845608028654 * kLog2E;  // of -2u / ln(2) at zero

// exp(-2u), held so far below infinity that its reciprocal is not zero.
template <typename A>
inline Vec<A> decay(Vec<A> z) {
  constexpr A largest = sizeof(A) == 4 ? static_cast<A>(126) : static_cast<A>(1022);
  const Vec<A> exponent = z * (z * z * static_cast<A>(kSlope * kCubic) + static_cast<A>(kSlope));
  return exp2<A>(exponent > largest ? Vec<A>{} + largest : exponent);
}

template <typename T>
void forward(const GeluRows& rows) {
  using A = Accumulator<T>;
  const T* bias = static_cast<const T*>(rows.bias);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.dim;
    T* out = static_cast<T*>(rows.out) + row * rows.dim;
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> z = load(x + i, part) + load(bias + i, part);
      store(out + i, z / (decay<A>(z) + static_cast<A>(1)), part);
    });
  }
}

template <typename T>
void backward(const GeluBackwardRows& rows) {
  using A = Accumulator<T>;
  const T* bias = static_cast<const T*>(rows.bias);
  A* dbias = static_cast<A*>(rows.dbias);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* grad = static_cast<const T*>(rows.grad) + row * rows.dim;
    const T* x = static_cast<const T*>(rows.x) + row * rows.dim;
    T* dx = static_cast<T*>(rows.dx) + row * rows.dim;
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> z = load(x + i, part) + load(bias + i, part);
      const Vec<A> e = decay<A>(z);
      const Vec<A> sigmoid = static_cast<A>(1) / (e + static_cast<A>(1));
      // 2 du/dz, and sigmoid (1 - sigmoid) without the cancellation.
      const Vec<A> slope = z * z * static_cast<A>(-3.0 * kSlope * kCubic * kLn2) + static_cast<A>(-kSlope * kLn2);
      const Vec<A> dz = load(grad + i, part) * (sigmoid + z * slope * (e * sigmoid * sigmoid));
      store(dx + i, dz, part);
      store(dbias + i, load(dbias + i, part) + dz, part);
    });
  }
}

}  // namespace

namespace PYARD_ISA {

GeluKernel gelu_tanh(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return forward<double>;
    case Storage::bfloat16:
      return forward<BFloat16>;
    case Storage::float16:
      return forward<Float16>;
    default:
      return forward<float>;
  }
}

GeluBackwardKernel gelu_tanh_backward(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return backward<double>;
    case Storage::bfloat16:
      return backward<BFloat16>;
    case Storage::float16:
      return backward<Float16>;
    default:
      return backward<float>;
  }
}

}  // namespace PYARD_ISA
}  // namespace pyard::cpu
