// The operators' CUDA kernels; shapes as in csrc/ops.h where an operator of the name stands there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace pyard::cuda {

using torch::stable::Tensor;

// Of the row operators, x, the residual and their gradients may be float32 where all else is bfloat16 or float16.
Tensor modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps);
std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                                 const Tensor& scale, double eps);

Tensor gated_residual(const Tensor& x, const Tensor& gate, const Tensor& branch);
std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& gate, const Tensor& branch);

// (residual = x + gate * branch, modulated_layer_norm(residual)) in one pass.
std::tuple<Tensor, Tensor> gated_residual_modulated_layer_norm(const Tensor& x,       // [B, S, T, D]
                                                               const Tensor& gate,    // [B, S, D]
                                                               const Tensor& branch,  // [B, S, T, D]
                                                               const Tensor& shift,   // [B, S, D]
                                                               const Tensor& scale,   // [B, S, D]
                                                               double eps);

// Gradients (dx, dgate, dbranch, dshift, dscale).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_modulated_layer_norm_backward(
    const Tensor& grad_residual,  // [B, S, T, D]
    const Tensor& grad_normal,    // [B, S, T, D]
    const Tensor& residual,       // [B, S, T, D]
    const Tensor& gate,           // [B, S, D]
    const Tensor& branch,         // [B, S, T, D]
    const Tensor& scale,          // [B, S, D]
    double eps);

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t tokens_per_step,
                                           int64_t mask, std::optional<int64_t> window, std::optional<Tensor> bias);

// The same bits in every run.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad, const Tensor& q,
                                                                    const Tensor& k, const Tensor& v, const Tensor& out,
                                                                    const Tensor& log_sum_exp, int64_t tokens_per_step,
                                                                    int64_t mask, std::optional<int64_t> window,
                                                                    std::optional<Tensor> bias);

// Two products of seven less; dq is summed in the order in which blocks come.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward_unordered(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& log_sum_exp,
    int64_t tokens_per_step, int64_t mask, std::optional<int64_t> window, std::optional<Tensor> bias);

Tensor gelu_tanh(const Tensor& x, const Tensor& bias);
std::tuple<Tensor, Tensor> gelu_tanh_backward(const Tensor& grad, const Tensor& x, const Tensor& bias);

Tensor timestep_embedding(const Tensor& times, int64_t dim, double max_period, double freq_shift);

// An index outside the store gives NaN: the device cannot raise.
std::tuple<Tensor, Tensor> gather_trajectories(const Tensor& noise, const Tensor& steps, const Tensor& indices,
                                               torch::headeronly::ScalarType dtype);

}  // namespace pyard::cuda
