// gelu_tanh, timestep_embedding and gather_trajectories on CUDA tensors.
#include <cmath>
#include <vector>

#include "cpu/tensors.h"
#include "cuda/operators.h"
#include "cuda/tensors.h"

namespace pyard::cuda {

namespace {

Gelu gelu_of(const Tensor& x, const Tensor& bias, const char* self) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, self, ": x has shape ", cpu::shape_of(x),
                  ", expected [..., D]");
  const int64_t dim = x.size(x.dim() - 1);
  cpu::check_shape(bias, self, "bias", {dim});
  check_like(bias, x, self, "bias");
  Gelu arguments{};
  arguments.scalar = scalar_of(x.scalar_type(), self);
  arguments.dim = small(dim, self);
  arguments.rows = x.numel() / dim;
  return arguments;
}

Tensor aligned(const Tensor& x) { return with_aligned_rows(torch::stable::contiguous(x)); }

}  // namespace

Tensor gelu_tanh(const Tensor& x, const Tensor& bias) {
  const char* self = "gelu_tanh";
  Gelu arguments = gelu_of(x, bias, self);
  const OnDevice device(x);
  const Tensor x_rows = aligned(x), bias_row = aligned(bias);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  arguments.x = x_rows.const_data_ptr();
  arguments.bias = bias_row.const_data_ptr();
  arguments.out = out.mutable_data_ptr();
  device.run(self, pyard_cuda_gelu_forward, arguments);
  return out;
}

std::tuple<Tensor, Tensor> gelu_tanh_backward(const Tensor& grad, const Tensor& x, const Tensor& bias) {
  const char* self = "gelu_tanh_backward";
  Gelu arguments = gelu_of(x, bias, self);
  check_like(grad, x, self, "grad");
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(same, self, ": grad has shape ", cpu::shape_of(grad), ", expected that of x, ", cpu::shape_of(x));
  const OnDevice device(x);
  const Tensor grad_rows = aligned(grad), x_rows = aligned(x), bias_row = aligned(bias);
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  arguments.parts = pyard_cuda_gelu_parts(arguments.rows);
  const int64_t partial_sizes[] = {arguments.parts, arguments.dim};
  const Tensor partial = torch::stable::new_empty(x, {partial_sizes, 2}, ScalarType::Float);
  const Tensor dbias = torch::stable::new_zeros(x, bias.sizes());  // zeros where there are no rows to sum
  arguments.grad = grad_rows.const_data_ptr();
  arguments.x = x_rows.const_data_ptr();
  arguments.bias = bias_row.const_data_ptr();
  arguments.out = dx.mutable_data_ptr();
  arguments.partial = static_cast<float*>(partial.mutable_data_ptr());
  arguments.dbias = dbias.mutable_data_ptr();
  device.run(self, pyard_cuda_gelu_backward, arguments);
  return {dx, dbias};
}

Tensor timestep_embedding(const Tensor& times, int64_t dim, double max_period, double freq_shift) {
  const char* self = "timestep_embedding";
  STD_TORCH_CHECK(times.scalar_type() == ScalarType::Float, self, ": times has dtype ",
                  torch::headeronly::toString(times.scalar_type()), ", expected float32");
  STD_TORCH_CHECK(dim >= 2 && static_cast<double>(dim / 2) > freq_shift, self, ": dim is ", dim,
                  ", expected at least 2 and dim // 2 > freq_shift = ", freq_shift);
  const OnDevice device(times);
  const Tensor flat = torch::stable::contiguous(times);
  std::vector<int64_t> sizes(times.sizes().begin(), times.sizes().end());
  sizes.push_back(dim);
  const Tensor out = torch::stable::new_empty(times, {sizes.data(), sizes.size()}, ScalarType::Float);
  const TimestepEmbedding arguments = {static_cast<const float*>(flat.const_data_ptr()),
                                       static_cast<float*>(out.mutable_data_ptr()),
                                       times.numel(),
                                       small(dim, self),
                                       static_cast<float>(-std::log(max_period)),
                                       static_cast<float>(static_cast<double>(dim / 2) - freq_shift)};
  device.run(self, pyard_cuda_timestep_embedding, arguments);
  return out;
}

std::tuple<Tensor, Tensor> gather_trajectories(const Tensor& noise, const Tensor& steps, const Tensor& indices,
                                               ScalarType dtype) {
  const char* self = "gather_trajectories";
  bool same = steps.dim() >= 2 && steps.dim() == noise.dim() + 1 && steps.size(0) == noise.size(0);
  for (int64_t i = 1; same && i < noise.dim(); ++i) same = noise.size(i) == steps.size(i + 1);
  STD_TORCH_CHECK(same, self, ": noise and steps have shapes ", cpu::shape_of(noise), " and ", cpu::shape_of(steps),
                  ", expected [n, ...] and [n, S, ...]");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, self, ": indices has shape ",
                  cpu::shape_of(indices), " and dtype ", torch::headeronly::toString(indices.scalar_type()),
                  ", expected [B] and int64");
  check_device(steps, noise, self, "steps");
  check_device(indices, noise, self, "indices");
  const OnDevice device(noise);
  const Tensor noise_rows = with_aligned_rows(torch::stable::contiguous(noise));
  const Tensor step_rows = with_aligned_rows(torch::stable::contiguous(steps));
  const Tensor index = torch::stable::contiguous(indices);
  std::vector<int64_t> sizes(steps.sizes().begin(), steps.sizes().end());
  sizes[0] = indices.size(0);
  const Tensor history = torch::stable::new_empty(steps, {sizes.data(), sizes.size()}, dtype);
  const Tensor target = torch::stable::new_empty(steps, {sizes.data(), sizes.size()}, dtype);
  if (history.numel() == 0) return {history, target};
  STD_TORCH_CHECK(steps.size(0) > 0, self, ": the store is empty");

  const int64_t n = steps.size(0), S = steps.size(1);
  GatherRows arguments{};
  arguments.to = scalar_of(dtype, self);
  arguments.index = static_cast<const int64_t*>(index.const_data_ptr());
  arguments.history = history.mutable_data_ptr();
  arguments.count = indices.size(0);
  arguments.rows = n;
  arguments.row = steps.numel() / (n * S);
  arguments.history_steps = S;
  arguments.from = scalar_of(noise.scalar_type(), self);
  arguments.store = noise_rows.const_data_ptr();
  arguments.steps = 1;
  device.run(self, pyard_cuda_gather_rows, arguments);
  arguments.from = scalar_of(steps.scalar_type(), self);
  arguments.store = step_rows.const_data_ptr();
  arguments.steps = S;
  arguments.target = target.mutable_data_ptr();
  arguments.history_offset = 1;
  device.run(self, pyard_cuda_gather_rows, arguments);
  return {history, target};
}

}  // namespace pyard::cuda
