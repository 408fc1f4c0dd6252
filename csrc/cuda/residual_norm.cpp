// modulated_layer_norm, gated_residual and the two in one pass on CUDA tensors. x, the residual and their gradients may
// be float32 where all else has 16 bits, as autocast leaves a float32 network: nothing is converted forth and back
// then.
#include "cpu/tensors.h"
#include "cuda/operators.h"
#include "cuda/tensors.h"

namespace pyard::cuda {

namespace {

// 0 where `other` has the dtype of the stream, else its own.
int narrow_of(const Tensor& stream, const Tensor& other, const char* self) {
  if (other.scalar_type() == stream.scalar_type()) return 0;
  const int narrow = scalar_of(other.scalar_type(), self);
  STD_TORCH_CHECK(stream.scalar_type() == ScalarType::Float && narrow != 0, self, ": dtypes ",
                  torch::headeronly::toString(stream.scalar_type()), " of x and ",
                  torch::headeronly::toString(other.scalar_type()),
                  " of what is beside it, expected the same, or float32 and 16 bits");
  return narrow;
}

// `x` is in the stream's dtype, `other` in that of all else.
ResidualNormSizes sizes_of(const Tensor& x, const Tensor& other, double eps, bool has_gate, bool has_norm,
                           const char* self) {
  STD_TORCH_CHECK(x.dim() == 4, self, ": x has shape ", cpu::shape_of(x), ", expected [B, S, T, D]");
  // Grid dimensions y and z end at 65535; backward has three sums for each step. Tokens are counted in 32 bits, those
  // of the last, ragged block included.
  STD_TORCH_CHECK(x.size(0) <= 65535 && x.size(1) <= 20000 && x.size(2) <= int64_t{1} << 30, self, ": batch ",
                  x.size(0), ", ", x.size(1), " steps and ", x.size(2),
                  " tokens, expected at most 65535, 20000 and 2^30");
  return {scalar_of(x.scalar_type(), self),
          small(x.size(0), self),
          small(x.size(1), self),
          small(x.size(2), self),
          small(x.size(3), self),
          static_cast<float>(eps),
          has_gate,
          has_norm,
          narrow_of(x, other, self)};
}

// Shapes are those of `x`, device and dtype those of `like`.
void check_tokens(const Tensor& tensor, const Tensor& x, const Tensor& like, const char* self, const char* argument) {
  cpu::check_shape(tensor, self, argument, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_like(tensor, like, self, argument);
}

void check_per_step(const Tensor& tensor, const Tensor& x, const Tensor& like, const char* self, const char* argument) {
  cpu::check_shape(tensor, self, argument, {x.size(0), x.size(1), x.size(3)});
  check_device(tensor, x, self, argument);
  check_like(tensor, like, self, argument);
}

Tensor new_tokens(const Tensor& x, const Tensor& like) { return torch::stable::new_empty(like, x.sizes()); }

// [B, S, D]; zeros where there are no tokens to sum.
Tensor new_sums(const Tensor& x, const Tensor& like) {
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(3)};
  return torch::stable::new_zeros(like, {sizes, 3});
}

// Scratch for the sums of blocks of rows.
Tensor new_partial(const Tensor& x, int64_t sums) {
  const int64_t parts = pyard_cuda_residual_norm_parts(static_cast<int>(x.size(2)));
  const int64_t sizes[] = {x.size(0) * x.size(1), parts, sums, x.size(3)};
  return torch::stable::new_empty(x, {sizes, 4}, ScalarType::Float);
}

}  // namespace

Tensor modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const char* self = "modulated_layer_norm";
  ResidualNormForward arguments{};
  arguments.sizes = sizes_of(x, scale, eps, false, true, self);
  check_per_step(shift, x, scale, self, "shift");
  check_per_step(scale, x, scale, self, "scale");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), shift_rows = with_aligned_rows(shift);
  const Tensor scale_rows = with_aligned_rows(scale), normal = new_tokens(x, scale);
  arguments.x = tokens(x_rows);
  arguments.shift = per_step(shift_rows);
  arguments.scale = per_step(scale_rows);
  arguments.normal = tokens(normal);
  device.run(self, pyard_cuda_residual_norm_forward, arguments);
  return normal;
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                                 const Tensor& scale, double eps) {
  const char* self = "modulated_layer_norm_backward";
  ResidualNormBackward arguments{};
  arguments.sizes = sizes_of(x, scale, eps, false, true, self);
  check_per_step(scale, x, scale, self, "scale");
  check_tokens(grad, x, scale, self, "grad");
  const OnDevice device(x);
  const Tensor grad_rows = with_aligned_rows(grad), x_rows = with_aligned_rows(x),
               scale_rows = with_aligned_rows(scale);
  const Tensor dx = new_tokens(x, x), partial = new_partial(x, 2);
  const Tensor dshift = new_sums(x, scale), dscale = new_sums(x, scale);
  arguments.grad_normal = tokens(grad_rows);
  arguments.residual = tokens(x_rows);
  arguments.scale = per_step(scale_rows);
  arguments.dx = tokens(dx);
  arguments.partial = static_cast<float*>(partial.mutable_data_ptr());
  arguments.dshift = dshift.mutable_data_ptr();
  arguments.dscale = dscale.mutable_data_ptr();
  device.run(self, pyard_cuda_residual_norm_backward, arguments);
  return {dx, dshift, dscale};
}

Tensor gated_residual(const Tensor& x, const Tensor& gate, const Tensor& branch) {
  const char* self = "gated_residual";
  ResidualNormForward arguments{};
  arguments.sizes = sizes_of(x, gate, 0.0, true, false, self);
  check_per_step(gate, x, gate, self, "gate");
  check_tokens(branch, x, gate, self, "branch");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch), residual = new_tokens(x, x);
  arguments.x = tokens(x_rows);
  arguments.gate = per_step(gate_rows);
  arguments.branch = tokens(branch_rows);
  arguments.residual = tokens(residual);
  device.run(self, pyard_cuda_residual_norm_forward, arguments);
  return residual;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& gate, const Tensor& branch) {
  const char* self = "gated_residual_backward";
  ResidualNormBackward arguments{};
  arguments.sizes = sizes_of(grad, gate, 0.0, true, false, self);
  check_per_step(gate, grad, gate, self, "gate");
  check_tokens(branch, grad, gate, self, "branch");
  const OnDevice device(grad);
  const Tensor grad_rows = with_aligned_rows(grad), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch);
  const Tensor dgate = new_sums(grad, gate), dbranch = new_tokens(grad, branch), partial = new_partial(grad, 1);
  arguments.grad_residual = tokens(grad_rows);
  arguments.branch = tokens(branch_rows);
  arguments.gate = per_step(gate_rows);
  arguments.dbranch = tokens(dbranch);
  arguments.partial = static_cast<float*>(partial.mutable_data_ptr());
  arguments.dgate = dgate.mutable_data_ptr();
  device.run(self, pyard_cuda_residual_norm_backward, arguments);
  return {dgate, dbranch};
}

std::tuple<Tensor, Tensor> gated_residual_modulated_layer_norm(const Tensor& x, const Tensor& gate,
                                                               const Tensor& branch, const Tensor& shift,
                                                               const Tensor& scale, double eps) {
  const char* self = "gated_residual_modulated_layer_norm";
  ResidualNormForward arguments{};
  arguments.sizes = sizes_of(x, scale, eps, true, true, self);
  check_per_step(gate, x, scale, self, "gate");
  check_tokens(branch, x, scale, self, "branch");
  check_per_step(shift, x, scale, self, "shift");
  check_per_step(scale, x, scale, self, "scale");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch), shift_rows = with_aligned_rows(shift);
  const Tensor scale_rows = with_aligned_rows(scale);
  const Tensor residual = new_tokens(x, x), normal = new_tokens(x, scale);
  arguments.x = tokens(x_rows);
  arguments.gate = per_step(gate_rows);
  arguments.branch = tokens(branch_rows);
  arguments.shift = per_step(shift_rows);
  arguments.scale = per_step(scale_rows);
  arguments.residual = tokens(residual);
  arguments.normal = tokens(normal);
  device.run(self, pyard_cuda_residual_norm_forward, arguments);
  return {residual, normal};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulated_layer_norm_backward(
    const Tensor& grad_residual, const Tensor& grad_normal, const Tensor& residual, const Tensor& gate,
    const Tensor& branch, const Tensor& scale, double eps) {
  const char* self = "gated_residual_modulated_layer_norm_backward";
  ResidualNormBackward arguments{};
  arguments.sizes = sizes_of(residual, scale, eps, true, true, self);
  check_tokens(grad_residual, residual, residual, self, "grad_residual");
  check_per_step(scale, residual, scale, self, "scale");
  check_tokens(grad_normal, residual, scale, self, "grad_normal");
  check_tokens(branch, residual, scale, self, "branch");
  check_per_step(gate, residual, scale, self, "gate");
  const OnDevice device(residual);
  const Tensor grad_residual_rows = with_aligned_rows(grad_residual), branch_rows = with_aligned_rows(branch);
  const Tensor grad_normal_rows = with_aligned_rows(grad_normal), residual_rows = with_aligned_rows(residual);
  const Tensor gate_rows = with_aligned_rows(gate), scale_rows = with_aligned_rows(scale);
  const Tensor dx = new_tokens(residual, residual), dbranch = new_tokens(residual, branch);
  const Tensor dgate = new_sums(residual, gate), dshift = new_sums(residual, scale), dscale = new_sums(residual, scale);
  const Tensor partial = new_partial(residual, 3);
  arguments.grad_residual = tokens(grad_residual_rows);
  arguments.grad_normal = tokens(grad_normal_rows);
  arguments.residual = tokens(residual_rows);
  arguments.branch = tokens(branch_rows);
  arguments.gate = per_step(gate_rows);
  arguments.scale = per_step(scale_rows);
  arguments.dx = tokens(dx);
  arguments.dbranch = tokens(dbranch);
  arguments.partial = static_cast<float*>(partial.mutable_data_ptr());
  arguments.dgate = dgate.mutable_data_ptr();
  arguments.dshift = dshift.mutable_data_ptr();
  arguments.dscale = dscale.mutable_data_ptr();
  device.run(self, pyard_cuda_residual_norm_backward, arguments);
  return {dx, dgate, dbranch, dshift, dscale};
}

}  // namespace pyard::cuda
