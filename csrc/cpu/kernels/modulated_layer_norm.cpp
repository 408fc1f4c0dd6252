// LayerNorm with a per-step shift and scale, after the adaLN block of Peebles & Xie, "Scalable Diffusion Models with
// Transformers", section 3.2: y = (x - mean) * rstd * (1 + scale) + shift. Compiled once per instruction set.
#include "modulated_layer_norm.h"

#include "vec.h"

namespace pyard::cpu {
namespace {

template <typename A>
struct Moments {
  A mean;
  A rstd;
};

// Two passes over a row that stays in the first-level cache: E[x^2] - E[x]^2 would cancel for rows far from zero.
template <typename T>
inline Moments<Accumulator<T>> moments_of(const T* x, int64_t dim, double eps) {
  using A = Accumulator<T>;
  const A mean = sum_over<A>(dim, [&](int64_t i, auto part) { return load(x + i, part); }) / static_cast<A>(dim);
  const A variance = sum_over<A>(dim,
                                 [&](int64_t i, auto part) {
                                   const Vec<A> centred = load(x + i, part) - mean;
                                   return centred * centred;
                                 }) /
                     static_cast<A>(dim);
  return {mean, static_cast<A>(1) / std::sqrt(variance + static_cast<A>(eps))};
}

template <typename X, typename Y>
void forward(const ModulatedLayerNormRows& rows) {
  using A = Accumulator<X>;
  const Y* shift = static_cast<const Y*>(rows.shift);
  const Y* scale = static_cast<const Y*>(rows.scale);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const X* x = static_cast<const X*>(rows.x) + row * rows.x_stride;
    Y* out = static_cast<Y*>(rows.out) + row * rows.out_stride;
    const Moments<A> moments = moments_of(x, rows.dim, rows.eps);
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> normal = (load(x + i, part) - moments.mean) * moments.rstd;
      store(out + i, normal * (load(scale + i, part) + static_cast<A>(1)) + load(shift + i, part), part);
    });
  }
}

template <typename X, typename Y>
void backward(const ModulatedLayerNormBackwardRows& rows) {
  using A = Accumulator<X>;
  const Y* scale = static_cast<const Y*>(rows.scale);
  A* dshift = static_cast<A*>(rows.dshift);
  A* dscale = static_cast<A*>(rows.dscale);
  const A inverse_dim = static_cast<A>(1) / static_cast<A>(rows.dim);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const X* x = static_cast<const X*>(rows.x) + row * rows.x_stride;
    const Y* grad = static_cast<const Y*>(rows.grad) + row * rows.grad_stride;
    X* dx = static_cast<X*>(rows.dx) + row * rows.dx_stride;
    const Moments<A> moments = moments_of(x, rows.dim, rows.eps);

    // With n = (x - mean) * rstd and g = grad * (1 + scale): dx = rstd * (g - mean(g) - n * mean(g * n)).
    Vec<A> total_g = {};
    Vec<A> total_gn = {};
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> dy = load(grad + i, part);
      const Vec<A> normal = (load(x + i, part) - moments.mean) * moments.rstd;
      const Vec<A> g = dy * (load(scale + i, part) + static_cast<A>(1));
      total_g += g;  // lanes beyond the end add nothing: there dy is zero
      total_gn += g * normal;
      store(dshift + i, load(dshift + i, part) + dy, part);
      store(dscale + i, load(dscale + i, part) + dy * normal, part);
    });
    const A mean_g = sum_of_lanes<A>(total_g) * inverse_dim;
    const A mean_gn = sum_of_lanes<A>(total_gn) * inverse_dim;
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> normal = (load(x + i, part) - moments.mean) * moments.rstd;
      const Vec<A> g = load(grad + i, part) * (load(scale + i, part) + static_cast<A>(1));
      store(dx + i, (g - mean_g - normal * mean_gn) * moments.rstd, part);
    });
  }
}

}  // namespace

namespace PYARD_ISA {

ModulatedLayerNormKernel modulated_layer_norm(Storage stream, Storage other) {
  switch (stream) {
    case Storage::float64:
      return forward<double, double>;
    case Storage::bfloat16:
      return forward<BFloat16, BFloat16>;
    case Storage::float16:
      return forward<Float16, Float16>;
    default:
      if (other == Storage::bfloat16) return forward<float, BFloat16>;
      if (other == Storage::float16) return forward<float, Float16>;
      return forward<float, float>;
  }
}

ModulatedLayerNormBackwardKernel modulated_layer_norm_backward(Storage stream, Storage other) {
  switch (stream) {
    case Storage::float64:
      return backward<double, double>;
    case Storage::bfloat16:
      return backward<BFloat16, BFloat16>;
    case Storage::float16:
      return backward<Float16, Float16>;
    default:
      if (other == Storage::bfloat16) return backward<float, BFloat16>;
      if (other == Storage::float16) return backward<float, Float16>;
      return backward<float, float>;
  }
}

}  // namespace PYARD_ISA
}  // namespace pyard::cpu
