#include "kernels/block_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>

#include "dispatch.h"
#include "ops.h"
#include "tensors.h"

namespace pyard::cpu {

namespace {

// Multiplications below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 18;

struct Sizes {
  int64_t B, H, T, head_dim;
  BlockMask mask;

  // Tasks are equal shares of a step's queries: never a function of the number of threads, and neither is any sum.
  int64_t shares() const { return (T + kQueriesPerTask - 1) / kQueriesPerTask; }
  int64_t queries_per_share() const { return ((T + shares() - 1) / shares() + 31) / 32 * 32; }
  int64_t queries() const { return mask.query_steps * T; }
  int64_t keys() const { return mask.key_steps * T; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }
};

// [B, H, tokens, Dh] with contiguous rows; strides count elements.
class Heads {
 public:
  Heads(const Tensor& tensor, bool writable)
      : data_(static_cast<char*>(writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()))),
        bytes_(static_cast<int64_t>(tensor.element_size())),
        strides_{tensor.stride(0), tensor.stride(1), tensor.stride(2)} {}
  Tokens at(int64_t b, int64_t h, int64_t token = 0) const { return {address(b, h, token), strides_[2]}; }
  MutableTokens mutable_at(int64_t b, int64_t h, int64_t token = 0) const {
    return {address(b, h, token), strides_[2]};
  }

 private:
  char* address(int64_t b, int64_t h, int64_t token) const {
    return data_ + (b * strides_[0] + h * strides_[1] + token * strides_[2]) * bytes_;
  }
  char* data_;
  int64_t bytes_;
  int64_t strides_[3];
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Workspace = std::unique_ptr<void, Free>;

Workspace new_workspace(int64_t bytes) {
  constexpr size_t alignment = 64;
  void* memory = std::aligned_alloc(alignment, (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment);
  STD_TORCH_CHECK(memory != nullptr, "block_attention: no memory for a workspace of ", bytes, " bytes");
  return Workspace(memory);
}

Mask mask_of(int64_t number, const char* self) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Mask::causal), self, ": mask is ", number,
                  ", expected 0 diagonal, 1 window, 2 anchor or 3 causal");
  return static_cast<Mask>(number);
}

Sizes check(const char* self, const Tensor& q, const Tensor& k, const Tensor& v, int64_t tokens_per_step, int64_t mask,
            std::optional<int64_t> window, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, self, ": q and k have shapes ", shape_of(q), " and ", shape_of(k),
                  ", expected [B, H, Sq * T, Dh] and [B, H, Sk * T, Dh]");
  const int64_t T = tokens_per_step, queries = q.size(2), keys = k.size(2);
  STD_TORCH_CHECK(T >= 1 && queries % T == 0 && keys % T == 0 && 0 < queries && queries <= keys, self, ": ", queries,
                  " queries and ", keys, " keys, expected multiples of tokens_per_step = ", T,
                  " and 1 <= query blocks <= key blocks");
  const Mask kind = mask_of(mask, self);
  STD_TORCH_CHECK(window.has_value() == (kind == Mask::window) && window.value_or(1) >= 1, self,
                  ": a window of at least 1 belongs to mask 1 (window) and to no other, found ", window.value_or(-1),
                  " with mask ", mask);
  check_shape(k, self, "k", {q.size(0), q.size(1), keys, q.size(3)});
  check_shape(v, self, "v", {q.size(0), q.size(1), keys, q.size(3)});
  for (const Tensor* other : {&k, &v}) {
    STD_TORCH_CHECK(other->scalar_type() == q.scalar_type(), self, ": k or v has dtype ",
                    torch::headeronly::toString(other->scalar_type()), ", expected that of q, ",
                    torch::headeronly::toString(q.scalar_type()));
  }
  if (bias.has_value()) {
    check_shape(*bias, self, "bias", {q.size(1)});
    STD_TORCH_CHECK(bias->scalar_type() == accumulator_of(storage_of(q, self)), self, ": bias has dtype ",
                    torch::headeronly::toString(bias->scalar_type()), ", expected ",
                    torch::headeronly::toString(accumulator_of(storage_of(q, self))));
  }
  return {q.size(0), q.size(1), T, q.size(3), {kind, window.value_or(1), queries / T, keys / T}};
}

double bias_of(const std::optional<Tensor>& bias, int64_t h) {
  if (!bias.has_value()) return 0.0;
  const int64_t at = h * bias->stride(0);
  if (bias->scalar_type() == ScalarType::Double) return static_cast<const double*>(bias->const_data_ptr())[at];
  return static_cast<double>(static_cast<const float*>(bias->const_data_ptr())[at]);
}

// [B, H, tokens, Dh] over the memory of [B, tokens, H, Dh], so that joining the heads afterwards costs nothing.
Tensor new_heads(const Tensor& like, int64_t tokens) {
  const int64_t sizes[] = {like.size(0), tokens, like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, {sizes, 4}), 1, 2);
}

}  // namespace

std::tuple<Tensor, Tensor> block_attention(const Tensor& q,  // [B, H, Sq * T, Dh]
                                           const Tensor& k,  // [B, H, Sk * T, Dh]
                                           const Tensor& v,  // [B, H, Sk * T, Dh]
                                           int64_t tokens_per_step, int64_t mask, std::optional<int64_t> window,
                                           std::optional<Tensor> bias) {  // [H]
  const char* self = "block_attention";
  const Sizes sizes = check(self, q, k, v, tokens_per_step, mask, window, bias);
  const Storage storage = storage_of(q, self);
  const auto kernel = PYARD_SELECT(block_attention)(storage);

  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  Tensor out = new_heads(q, sizes.queries());
  const int64_t statistics[] = {sizes.B, sizes.H, sizes.queries()};
  Tensor log_sum_exp = torch::stable::new_empty(q, {statistics, 3}, accumulator_of(storage));
  const Heads q_at(q_rows, false), k_at(k_rows, false), v_at(v_rows, false), out_at(out, true);
  char* log_sum_exp_data = static_cast<char*>(log_sum_exp.mutable_data_ptr());
  const int64_t log_sum_exp_bytes = static_cast<int64_t>(log_sum_exp.element_size());

  const int64_t tasks_per_head = sizes.mask.query_steps * sizes.shares();
  const int64_t work = sizes.queries_per_share() * sizes.T * (sizes.mask.key_steps + 1) * sizes.head_dim;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (work + 1));
  torch::stable::parallel_for(0, sizes.B * sizes.H * tasks_per_head, grain, [&](int64_t begin, int64_t end) {
    const Workspace workspace = new_workspace(kernel.workspace_bytes(sizes.head_dim));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t head = index / tasks_per_head, b = head / sizes.H, h = head % sizes.H;
      const int64_t query_step = index % tasks_per_head / sizes.shares();
      const int64_t in_step = index % sizes.shares() * sizes.queries_per_share();
      if (in_step >= sizes.T) continue;
      const int64_t first = query_step * sizes.T + in_step;
      const int64_t step = sizes.mask.key_steps - sizes.mask.query_steps + query_step;
      Steps earlier = earlier_steps(sizes.mask, step), own = {step, step + 1};
      if (!bias.has_value() && earlier.end == step) {  // nothing tells them apart: one range, so fewer tiles
        own.begin = earlier.begin;
        earlier.end = earlier.begin;
      }
      kernel.run({q_at.at(b, h, first),
                  k_at.at(b, h),
                  v_at.at(b, h),
                  out_at.mutable_at(b, h, first),
                  log_sum_exp_data + (head * sizes.queries() + first) * log_sum_exp_bytes,
                  std::min(sizes.queries_per_share(), sizes.T - in_step),
                  sizes.head_dim,
                  sizes.scale(),
                  {{earlier.begin * sizes.T, earlier.end * sizes.T, bias_of(bias, h)},
                   {own.begin * sizes.T, own.end * sizes.T, 0.0}},
                  workspace.get()});
    }
  });
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad,         // [B, H, Sq * T, Dh]
                                                                    const Tensor& q,            // [B, H, Sq * T, Dh]
                                                                    const Tensor& k,            // [B, H, Sk * T, Dh]
                                                                    const Tensor& v,            // [B, H, Sk * T, Dh]
                                                                    const Tensor& out,          // [B, H, Sq * T, Dh]
                                                                    const Tensor& log_sum_exp,  // [B, H, Sq * T]
                                                                    int64_t tokens_per_step, int64_t mask,
                                                                    std::optional<int64_t> window,
                                                                    std::optional<Tensor> bias) {  // [H]
  const char* self = "block_attention_backward";
  const Sizes sizes = check(self, q, k, v, tokens_per_step, mask, window, bias);
  const Storage storage = storage_of(q, self);
  for (const Tensor* other : {&grad, &out}) {
    check_shape(*other, self, other == &grad ? "grad" : "out", {sizes.B, sizes.H, sizes.queries(), sizes.head_dim});
    STD_TORCH_CHECK(other->scalar_type() == q.scalar_type(), self, ": grad or out has dtype ",
                    torch::headeronly::toString(other->scalar_type()), ", expected that of q, ",
                    torch::headeronly::toString(q.scalar_type()));
  }
  check_shape(log_sum_exp, self, "log_sum_exp", {sizes.B, sizes.H, sizes.queries()});
  STD_TORCH_CHECK(log_sum_exp.scalar_type() == accumulator_of(storage), self, ": log_sum_exp has dtype ",
                  torch::headeronly::toString(log_sum_exp.scalar_type()), ", expected ",
                  torch::headeronly::toString(accumulator_of(storage)));
  const auto kernel = PYARD_SELECT(block_attention_backward)(storage);

  const Tensor grad_rows = with_contiguous_rows(grad), out_rows = with_contiguous_rows(out);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  const Tensor statistics = torch::stable::contiguous(log_sum_exp);
  Tensor dq = new_heads(q, sizes.queries()), dk = new_heads(k, sizes.keys()), dv = new_heads(v, sizes.keys());
  // One partial sum per sample and head; without a bias, none.
  const int64_t bias_sizes[] = {sizes.B, bias.has_value() ? sizes.H : 0};
  Tensor dbias = torch::stable::new_zeros(q, {bias_sizes, 2}, accumulator_of(storage));
  const Heads grad_at(grad_rows, false), q_at(q_rows, false), k_at(k_rows, false), v_at(v_rows, false);
  const Heads out_at(out_rows, false), dq_at(dq, true), dk_at(dk, true), dv_at(dv, true);
  const char* statistics_data = static_cast<const char*>(statistics.const_data_ptr());
  char* dbias_data = static_cast<char*>(dbias.mutable_data_ptr());
  const int64_t accumulator_bytes = static_cast<int64_t>(statistics.element_size());

  const int64_t work = sizes.queries() * sizes.keys() * sizes.head_dim * 2;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (work + 1));
  torch::stable::parallel_for(0, sizes.B * sizes.H, grain, [&](int64_t begin, int64_t end) {
    const Workspace workspace = new_workspace(kernel.workspace_bytes(sizes.mask.query_steps, sizes.T, sizes.head_dim));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / sizes.H, h = index % sizes.H;
      kernel.run({grad_at.at(b, h), q_at.at(b, h), k_at.at(b, h), v_at.at(b, h), out_at.at(b, h),
                  statistics_data + index * sizes.queries() * accumulator_bytes, dq_at.mutable_at(b, h),
                  dk_at.mutable_at(b, h), dv_at.mutable_at(b, h),
                  bias.has_value() ? dbias_data + index * accumulator_bytes : nullptr, sizes.mask, sizes.T,
                  sizes.head_dim, sizes.scale(), bias_of(bias, h), workspace.get()});
    }
  });
  const int64_t batch_dim = 0;
  return {dq, dk, dv, torch::stable::sum(dbias, torch::headeronly::IntHeaderOnlyArrayRef(&batch_dim, 1))};
}

}  // namespace pyard::cpu
