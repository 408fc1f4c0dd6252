// The operators' CPU kernels. B batch, S num_steps, T tokens_per_step, D hidden size.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace pyard {

using torch::stable::Tensor;

namespace cpu {

// LayerNorm over D without affine parameters, then * (1 + scale) + shift.
Tensor modulated_layer_norm(const Tensor& x,      // [B, S, T, D]
                            const Tensor& shift,  // [B, S, D]
                            const Tensor& scale,  // [B, S, D]
                            double eps);          // returns [B, S, T, D], contiguous

// Gradients (dx [B, S, T, D], dshift [B, S, D], dscale [B, S, D]); mean and rstd are computed again from x.
std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad,   // [B, S, T, D]
                                                                 const Tensor& x,      // [B, S, T, D]
                                                                 const Tensor& scale,  // [B, S, D]
                                                                 double eps);

}  // namespace cpu
}  // namespace pyard
