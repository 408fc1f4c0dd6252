// modulated_layer_norm, gated_residual and the two in one pass on CUDA tensors.
#include "cpu/tensors.h"
#include "cuda/operators.h"
#include "cuda/tensors.h"

namespace pyard::cuda {

namespace {

ResidualNormSizes sizes_of(const Tensor& x, double eps, bool has_gate, bool has_norm, const char* self) {
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
          has_norm};
}

void check_tokens(const Tensor& tensor, const Tensor& x, const char* self, const char* argument) {
  cpu::check_shape(tensor, self, argument, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_like(tensor, x, self, argument);
}

void check_per_step(const Tensor& tensor, const Tensor& x, const char* self, const char* argument) {
  cpu::check_shape(tensor, self, argument, {x.size(0), x.size(1), x.size(3)});
  check_like(tensor, x, self, argument);
}

Tensor new_tokens(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

// [B, S, D]; zeros where there are no tokens to sum.
Tensor new_sums(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(3)};
  return torch::stable::new_zeros(x, {sizes, 3});
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
  arguments.sizes = sizes_of(x, eps, false, true, self);
  check_per_step(shift, x, self, "shift");
  check_per_step(scale, x, self, "scale");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), shift_rows = with_aligned_rows(shift);
  const Tensor scale_rows = with_aligned_rows(scale), normal = new_tokens(x);
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
  arguments.sizes = sizes_of(x, eps, false, true, self);
  check_tokens(grad, x, self, "grad");
  check_per_step(scale, x, self, "scale");
  const OnDevice device(x);
  const Tensor grad_rows = with_aligned_rows(grad), x_rows = with_aligned_rows(x),
               scale_rows = with_aligned_rows(scale);
  const Tensor dx = new_tokens(x), dshift = new_sums(x), dscale = new_sums(x), partial = new_partial(x, 2);
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
  arguments.sizes = sizes_of(x, 0.0, true, false, self);
  check_per_step(gate, x, self, "gate");
  check_tokens(branch, x, self, "branch");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch), residual = new_tokens(x);
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
  arguments.sizes = sizes_of(branch, 0.0, true, false, self);
  check_tokens(grad, branch, self, "grad");
  check_per_step(gate, branch, self, "gate");
  const OnDevice device(branch);
  const Tensor grad_rows = with_aligned_rows(grad), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch);
  const Tensor dgate = new_sums(branch), dbranch = new_tokens(branch), partial = new_partial(branch, 1);
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
  arguments.sizes = sizes_of(x, eps, true, true, self);
  check_per_step(gate, x, self, "gate");
  check_tokens(branch, x, self, "branch");
  check_per_step(shift, x, self, "shift");
  check_per_step(scale, x, self, "scale");
  const OnDevice device(x);
  const Tensor x_rows = with_aligned_rows(x), gate_rows = with_aligned_rows(gate);
  const Tensor branch_rows = with_aligned_rows(branch), shift_rows = with_aligned_rows(shift);
  const Tensor scale_rows = with_aligned_rows(scale), residual = new_tokens(x), normal = new_tokens(x);
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
  arguments.sizes = sizes_of(residual, eps, true, true, self);
  check_tokens(grad_residual, residual, self, "grad_residual");
  check_tokens(grad_normal, residual, self, "grad_normal");
  check_tokens(branch, residual, self, "branch");
  check_per_step(gate, residual, self, "gate");
  check_per_step(scale, residual, self, "scale");
  const OnDevice device(residual);
  const Tensor grad_residual_rows = with_aligned_rows(grad_residual), branch_rows = with_aligned_rows(branch);
  const Tensor grad_normal_rows = with_aligned_rows(grad_normal), residual_rows = with_aligned_rows(residual);
  const Tensor gate_rows = with_aligned_rows(gate), scale_rows = with_aligned_rows(scale);
  const Tensor dx = new_tokens(residual), dbranch = new_tokens(residual), partial = new_partial(residual, 3);
  const Tensor dgate = new_sums(residual), dshift = new_sums(residual), dscale = new_sums(residual);
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
