// x + gate * branch with one gate per step: the residual of an adaLN-Zero block (Peebles & Xie, "Scalable Diffusion
// Models with Transformers", figure 3). Compiled once per instruction set.
#include "gated_residual.h"

#include "vec.h"

namespace pyard::cpu {
namespace {

template <typename X, typename Y>
void forward(const GatedResidualRows& rows) {
  const Y* gate = static_cast<const Y*>(rows.gate);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const X* x = static_cast<const X*>(rows.x) + row * rows.x_stride;
    const Y* branch = static_cast<const Y*>(rows.branch) + row * rows.branch_stride;
    X* out = static_cast<X*>(rows.out) + row * rows.out_stride;
    for_each_vector<Accumulator<X>>(rows.dim, [&](int64_t i, auto part) {
      store(out + i, load(x + i, part) + load(gate + i, part) * load(branch + i, part), part);
    });
  }
}

template <typename X, typename Y>
void backward(const GatedResidualBackwardRows& rows) {
  using A = Accumulator<X>;
  const Y* gate = static_cast<const Y*>(rows.gate);
  A* dgate = static_cast<A*>(rows.dgate);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const X* grad = static_cast<const X*>(rows.grad) + row * rows.grad_stride;
    const Y* branch = static_cast<const Y*>(rows.branch) + row * rows.branch_stride;
    Y* dbranch = static_cast<Y*>(rows.dbranch) + row * rows.dbranch_stride;
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> dy = load(grad + i, part);
      store(dbranch + i, dy * load(gate + i, part), part);
      store(dgate + i, load(dgate + i, part) + dy * load(branch + i, part), part);
    });
  }
}

}  // namespace

namespace PYARD_ISA {

GatedResidualKernel gated_residual(Storage stream, Storage other) {
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

GatedResidualBackwardKernel gated_residual_backward(Storage stream, Storage other) {
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
