// x + gate * branch with one gate per step: the residual of an adaLN-Zero block (Peebles & Xie, "Scalable Diffusion
// Models with Transformers", figure 3). Compiled once per instruction set.
#include "gated_residual.h"

#include "vec.h"

namespace pyard::cpu {
namespace {

template <typename T>
void forward(const GatedResidualRows& rows) {
  const T* gate = static_cast<const T*>(rows.gate);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    const T* branch = static_cast<const T*>(rows.branch) + row * rows.branch_stride;
    T* out = static_cast<T*>(rows.out) + row * rows.out_stride;
    for_each_vector<Accumulator<T>>(rows.dim, [&](int64_t i, auto part) {
      store(out + i, load(x + i, part) + load(gate + i, part) * load(branch + i, part), part);
    });
  }
}

template <typename T>
void backward(const GatedResidualBackwardRows& rows) {
  using A = Accumulator<T>;
  const T* gate = static_cast<const T*>(rows.gate);
  A* dgate = static_cast<A*>(rows.dgate);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* grad = static_cast<const T*>(rows.grad) + row * rows.grad_stride;
    const T* branch = static_cast<const T*>(rows.branch) + row * rows.branch_stride;
    T* dbranch = static_cast<T*>(rows.dbranch) + row * rows.dbranch_stride;
    for_each_vector<A>(rows.dim, [&](int64_t i, auto part) {
      const Vec<A> dy = load(grad + i, part);
      store(dbranch + i, dy * load(gate + i, part), part);
      store(dgate + i, load(dgate + i, part) + dy * load(branch + i, part), part);
    });
  }
}

}  // namespace

namespace PYARD_ISA {

GatedResidualKernel gated_residual(Storage storage) {
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

GatedResidualBackwardKernel gated_residual_backward(Storage storage) {
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
