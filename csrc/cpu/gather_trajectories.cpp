#include <vector>

#include "dispatch.h"
#include "kernels/convert.h"
#include "ops.h"
#include "tensors.h"

namespace pyard::cpu {

namespace {

Storage storage_of_type(ScalarType dtype, const char* self) {
  if (dtype == ScalarType::BFloat16) return Storage::bfloat16;
  if (dtype == ScalarType::Half) return Storage::float16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, self, ": dtype is ", torch::headeronly::toString(dtype),
                  ", expected float32, bfloat16 or float16");
  return Storage::float32;
}

}  // namespace

std::tuple<Tensor, Tensor> gather_trajectories(const Tensor& noise,    // [n, ...]
                                               const Tensor& steps,    // [n, S, ...]
                                               const Tensor& indices,  // [B] int64
                                               ScalarType dtype) {
  const char* self = "gather_trajectories";
  STD_TORCH_CHECK(steps.dim() >= 2 && steps.dim() == noise.dim() + 1 && steps.size(0) == noise.size(0), self,
                  ": noise and steps have shapes ", shape_of(noise), " and ", shape_of(steps),
                  ", expected [n, ...] and [n, S, ...]");
  for (int64_t i = 1; i < noise.dim(); ++i) {
    STD_TORCH_CHECK(noise.size(i) == steps.size(i + 1), self, ": noise and steps have shapes ", shape_of(noise),
                    " and ", shape_of(steps), ", expected [n, ...] and [n, S, ...]");
  }
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, self, ": indices has shape ",
                  shape_of(indices), " and dtype ", torch::headeronly::toString(indices.scalar_type()),
                  ", expected [B] and int64");
  const Storage to = storage_of_type(dtype, self);
  const auto convert_noise = PYARD_SELECT(convert)(storage_of_type(noise.scalar_type(), self), to);
  const auto convert_steps = PYARD_SELECT(convert)(storage_of_type(steps.scalar_type(), self), to);

  const int64_t n = steps.size(0), S = steps.size(1), B = indices.size(0);
  const Tensor noise_rows = torch::stable::contiguous(noise), step_rows = torch::stable::contiguous(steps);
  const Tensor index_row = torch::stable::contiguous(indices);
  const int64_t* index = static_cast<const int64_t*>(index_row.const_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(0 <= index[b] && index[b] < n, self, ": index ", index[b], " at place ", b,
                    ", expected 0 to n - 1 = ", n - 1);
  }
  std::vector<int64_t> sizes(steps.sizes().begin(), steps.sizes().end());
  sizes[0] = B;
  Tensor history = torch::stable::new_empty(steps, {sizes.data(), sizes.size()}, dtype);
  Tensor target = torch::stable::new_empty(steps, {sizes.data(), sizes.size()}, dtype);
  if (history.numel() == 0) return {history, target};

  const int64_t size = steps.numel() / (n * S);
  const char* noise_data = static_cast<const char*>(noise_rows.const_data_ptr());
  const char* steps_data = static_cast<const char*>(step_rows.const_data_ptr());
  char* history_data = static_cast<char*>(history.mutable_data_ptr());
  char* target_data = static_cast<char*>(target.mutable_data_ptr());
  const int64_t noise_bytes = size * static_cast<int64_t>(noise.element_size());
  const int64_t step_bytes = size * static_cast<int64_t>(steps.element_size());
  const int64_t out_bytes = size * static_cast<int64_t>(history.element_size());
  constexpr int64_t elements_per_thread = 32768;

  torch::stable::parallel_for(0, B, 1 + elements_per_thread / (S * size), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const char* from = steps_data + index[b] * S * step_bytes;
      char* to_history = history_data + b * S * out_bytes;
      char* to_target = target_data + b * S * out_bytes;
      convert_noise(noise_data + index[b] * noise_bytes, to_history, size);
      convert_steps(from, to_history + out_bytes, (S - 1) * size);
      convert_steps(from, to_target, S * size);
    }
  });
  return {history, target};
}

}  // namespace pyard::cpu
