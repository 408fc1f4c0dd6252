// The operators' CPU kernels. B batch, S num_steps, T tokens_per_step, D hidden size, H heads,
// Dh head size.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace pyard {

using torch::stable::Tensor;

namespace cpu {

// Of modulated_layer_norm and gated_residual, x, the residual and their gradients may be float32 where all else is
// bfloat16 or float16: the dtypes of scale and gate say so.

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

// Attention of each query block to the key blocks that the mask shows it; the Sq query blocks are the last of the Sk
// key blocks. Returns out [B, H, Sq * T, Dh] over the memory of [B, Sq * T, H, Dh], and log_sum_exp [B, H, Sq * T] of
// the scaled logits in the accumulator's dtype. `mask` counts in pyard.ops.masks.MASKS: a string would leak, as the
// stable ABI hands over a copy that nobody frees.
std::tuple<Tensor, Tensor> block_attention(const Tensor& q,  // [B, H, Sq * T, Dh]
                                           const Tensor& k,  // [B, H, Sk * T, Dh]
                                           const Tensor& v,  // [B, H, Sk * T, Dh]
                                           int64_t tokens_per_step, int64_t mask, std::optional<int64_t> window,
                                           std::optional<Tensor> bias);  // [H], in the accumulator's dtype

// Gradients (dq, dk, dv, dbias [H], or [0] where there is no bias).
std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad,         // [B, H, Sq * T, Dh]
                                                                    const Tensor& q,            // [B, H, Sq * T, Dh]
                                                                    const Tensor& k,            // [B, H, Sk * T, Dh]
                                                                    const Tensor& v,            // [B, H, Sk * T, Dh]
                                                                    const Tensor& out,          // [B, H, Sq * T, Dh]
                                                                    const Tensor& log_sum_exp,  // [B, H, Sq * T]
                                                                    int64_t tokens_per_step, int64_t mask,
                                                                    std::optional<int64_t> window,
                                                                    std::optional<Tensor> bias);  // [H]

// x + gate * branch.
Tensor gated_residual(const Tensor& x,        // [B, S, T, D]
                      const Tensor& gate,     // [B, S, D]
                      const Tensor& branch);  // [B, S, T, D]; returns [B, S, T, D], contiguous

// Gradients (dgate [B, S, D], dbranch [B, S, T, D]); that of x is `grad` itself.
std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad,     // [B, S, T, D]
                                                   const Tensor& gate,     // [B, S, D]
                                                   const Tensor& branch);  // [B, S, T, D]

// The tanh form of GELU of x + bias.
Tensor gelu_tanh(const Tensor& x,      // [..., D]
                 const Tensor& bias);  // [D]; returns [..., D], contiguous

// Gradients (dx [..., D], dbias [D]).
std::tuple<Tensor, Tensor> gelu_tanh_backward(const Tensor& grad,   // [..., D]
                                              const Tensor& x,      // [..., D]
                                              const Tensor& bias);  // [D]

// cos(t f_i), then sin(t f_i), f_i = max_period^(-i / (dim // 2 - freq_shift)); an odd dim ends in a zero.
Tensor timestep_embedding(const Tensor& times,                                 // [...] float32
                          int64_t dim, double max_period, double freq_shift);  // returns [..., dim] float32

// Trajectories `indices` as (history [B, S, ...] = [noise, steps[:-1]], target [B, S, ...] = steps), in `dtype`.
std::tuple<Tensor, Tensor> gather_trajectories(const Tensor& noise,    // [n, ...]
                                               const Tensor& steps,    // [n, S, ...]
                                               const Tensor& indices,  // [B] int64
                                               torch::headeronly::ScalarType dtype);

}  // namespace cpu
}  // namespace pyard
