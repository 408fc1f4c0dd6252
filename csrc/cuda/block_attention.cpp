// block_attention on CUDA tensors. Shapes are those of csrc/ops.h.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"
#include "cuda/operators.h"
#include "cuda/tensors.h"

namespace pyard::cuda {

namespace {

// The kernels count the rows of a head in 32 bits, a tile beyond the last one included.
constexpr int64_t kMostRows = int64_t{1} << 30;

int mask_of(int64_t number, const char* self) {
  STD_TORCH_CHECK(number >= 0 && number <= kCausal, self, ": mask is ", number,
                  ", expected 0 diagonal, 1 window, 2 anchor or 3 causal");
  return static_cast<int>(number);
}

Attention checked(const char* self, const Tensor& q, const Tensor& k, const Tensor& v, int64_t tokens_per_step,
                  int64_t mask, std::optional<int64_t> window, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, self, ": q and k have shapes ", cpu::shape_of(q), " and ",
                  cpu::shape_of(k), ", expected [B, H, Sq * T, Dh] and [B, H, Sk * T, Dh]");
  const int64_t B = q.size(0), H = q.size(1), queries = q.size(2), keys = k.size(2), dim = q.size(3);
  const int64_t T = tokens_per_step;
  STD_TORCH_CHECK(T >= 1 && queries % T == 0 && keys % T == 0 && 0 < queries && queries <= keys, self, ": ", queries,
                  " queries and ", keys, " keys, expected multiples of tokens_per_step = ", T,
                  " and 1 <= query blocks <= key blocks");
  STD_TORCH_CHECK(keys <= kMostRows, self, ": ", keys, " keys, expected at most ", kMostRows);
  STD_TORCH_CHECK(dim >= 8 && dim <= 128 && dim % 8 == 0, self, ": head size ", dim,
                  ", expected a multiple of 8 from 8 to 128");
  STD_TORCH_CHECK(B <= 65535 && H <= 65535, self, ": batch ", B, " and ", H, " heads, expected at most 65535 of each");
  cpu::check_shape(k, self, "k", {B, H, keys, dim});
  cpu::check_shape(v, self, "v", {B, H, keys, dim});
  check_like(k, q, self, "k");
  check_like(v, q, self, "v");
  const int kind = mask_of(mask, self);
  STD_TORCH_CHECK(window.has_value() == (kind == kWindow) && window.value_or(1) >= 1, self,
                  ": a window of at least 1 belongs to mask 1 (window) and to no other, found ", window.value_or(-1),
                  " with mask ", mask);
  const float* bias_data = nullptr;
  if (bias.has_value()) {
    cpu::check_shape(*bias, self, "bias", {H});
    check_device(*bias, q, self, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, self, ": bias has dtype ",
                    torch::headeronly::toString(bias->scalar_type()), ", expected float32");
    bias_data = static_cast<const float*>(bias->const_data_ptr());
  }
  const BlockMask block_mask = {small(queries / T, self), small(keys / T, self), small(T, self), kind,
                                small(std::min(window.value_or(1), keys / T), self)};
  return {scalar_of(q.scalar_type(), self),
          small(B, self),
          small(H, self),
          small(dim, self),
          block_mask,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))),
          bias_data,
          heads(q),
          heads(k),
          heads(v)};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// [B, H, tokens, Dh] over the memory of [B, tokens, H, Dh], so that joining the heads afterwards costs nothing.
Tensor new_heads(const Tensor& like) {
  const int64_t sizes[] = {like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, {sizes, 4}), 1, 2);
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const char* self, bool deterministic, const Tensor& grad,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& out, const Tensor& log_sum_exp,
                                                    int64_t tokens_per_step, int64_t mask,
                                                    std::optional<int64_t> window, const std::optional<Tensor>& bias) {
  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(k), v_rows = with_aligned_rows(v);
  const Tensor grad_rows = with_aligned_rows(grad), out_rows = with_aligned_rows(out);
  const std::optional<Tensor> bias_row = contiguous(bias);
  const Attention attention = checked(self, q_rows, k_rows, v_rows, tokens_per_step, mask, window, bias_row);
  const int64_t B = q.size(0), H = q.size(1), queries = q.size(2);
  for (const Tensor* tensor : {&grad, &out}) {
    const char* argument = tensor == &grad ? "grad" : "out";
    cpu::check_shape(*tensor, self, argument, {B, H, queries, q.size(3)});
    check_like(*tensor, q, self, argument);
  }
  cpu::check_shape(log_sum_exp, self, "log_sum_exp", {B, H, queries});
  check_device(log_sum_exp, q, self, "log_sum_exp");
  STD_TORCH_CHECK(log_sum_exp.scalar_type() == ScalarType::Float, self, ": log_sum_exp must be float32");
  const Tensor statistics = torch::stable::contiguous(log_sum_exp);

  const OnDevice device(q);
  const Tensor dq = new_heads(q), dk = new_heads(k), dv = new_heads(v);
  const Tensor delta = new_floats(q, {B, H, queries});
  const int64_t sums_sizes[] = {B, H, queries, deterministic ? 0 : q.size(3)};
  const Tensor dq_sums = torch::stable::new_zeros(q, {sums_sizes, 4}, ScalarType::Float);
  // One partial sum per sample, head and tile of keys; without a bias, none.
  const int64_t tiles = pyard_cuda_attention_key_tiles(attention.mask.key_steps, attention.mask.tokens);
  const Tensor dbias = new_floats(q, {B, bias.has_value() ? H : 0, tiles});
  AttentionBackward arguments{};
  arguments.attention = attention;
  arguments.out = heads(out_rows);
  arguments.grad = heads(grad_rows);
  arguments.lse = static_cast<const float*>(statistics.const_data_ptr());
  arguments.delta = static_cast<float*>(delta.mutable_data_ptr());
  arguments.deterministic = deterministic ? 1 : 0;
  arguments.dq_sums = static_cast<float*>(dq_sums.mutable_data_ptr());
  arguments.dq = heads(dq);
  arguments.dk = heads(dk);
  arguments.dv = heads(dv);
  arguments.dbias = bias.has_value() ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  device.run(self, pyard_cuda_attention_backward, arguments);

  const int64_t summed[] = {0, 2};
  const Tensor bias_grad = torch::stable::sum(dbias, torch::headeronly::IntHeaderOnlyArrayRef(summed, 2));
  if (deterministic) return {dq, dk, dv, bias_grad};
  Tensor rounded = dq;
  torch::stable::copy_(rounded, dq_sums);
  return {rounded, dk, dv, bias_grad};
}

}  // namespace

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t tokens_per_step,
                                           int64_t mask, std::optional<int64_t> window, std::optional<Tensor> bias) {
  const char* self = "block_attention";
  const Tensor q_rows = with_aligned_rows(q), k_rows = with_aligned_rows(k), v_rows = with_aligned_rows(v);
  const std::optional<Tensor> bias_row = contiguous(bias);
  AttentionForward arguments{};
  arguments.attention = checked(self, q_rows, k_rows, v_rows, tokens_per_step, mask, window, bias_row);
  const OnDevice device(q);
  const Tensor out = new_heads(q), log_sum_exp = new_floats(q, {q.size(0), q.size(1), q.size(2)});
  arguments.out = heads(out);
  arguments.lse = static_cast<float*>(log_sum_exp.mutable_data_ptr());
  device.run(self, pyard_cuda_attention_forward, arguments);
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad, const Tensor& q,
                                                                    const Tensor& k, const Tensor& v, const Tensor& out,
                                                                    const Tensor& log_sum_exp, int64_t tokens_per_step,
                                                                    int64_t mask, std::optional<int64_t> window,
                                                                    std::optional<Tensor> bias) {
  return backward("block_attention_backward", true, grad, q, k, v, out, log_sum_exp, tokens_per_step, mask, window,
                  bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward_unordered(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& log_sum_exp,
    int64_t tokens_per_step, int64_t mask, std::optional<int64_t> window, std::optional<Tensor> bias) {
  return backward("block_attention_backward_unordered", false, grad, q, k, v, out, log_sum_exp, tokens_per_step, mask,
                  window, bias);
}

}  // namespace pyard::cuda
