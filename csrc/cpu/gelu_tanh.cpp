#include "kernels/gelu_tanh.h"

#include <algorithm>

#include "dispatch.h"
#include "ops.h"
#include "tensors.h"

namespace pyard::cpu {

namespace {

// A constant, so that no sum depends on the number of threads.
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kElementsPerThread = 16384;

struct Rows {
  int64_t rows, dim;
  int64_t tasks() const { return (rows + kRowsPerTask - 1) / kRowsPerTask; }
  int64_t rows_of(int64_t task) const { return std::min(kRowsPerTask, rows - task * kRowsPerTask); }
  int64_t grain() const { return std::max<int64_t>(1, kElementsPerThread / (kRowsPerTask * dim + 1)); }
};

Rows check(const char* self, const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, self, ": x has shape ", shape_of(x), ", expected [..., D]");
  const int64_t dim = x.size(x.dim() - 1);
  check_shape(bias, self, "bias", {dim});
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type(), self, ": bias has dtype ",
                  torch::headeronly::toString(bias.scalar_type()), ", expected that of x, ",
                  torch::headeronly::toString(x.scalar_type()));
  return {x.numel() / dim, dim};
}

}  // namespace

Tensor gelu_tanh(const Tensor& x,       // [..., D]
                 const Tensor& bias) {  // [D]
  const char* self = "gelu_tanh";
  const Rows rows = check(self, x, bias);
  const auto kernel = PYARD_SELECT(gelu_tanh)(storage_of(x, self));
  const Tensor x_rows = torch::stable::contiguous(x), bias_row = torch::stable::contiguous(bias);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const char* x_data = static_cast<const char*>(x_rows.const_data_ptr());
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = kRowsPerTask * rows.dim * static_cast<int64_t>(x.element_size());

  torch::stable::parallel_for(0, rows.tasks(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      kernel({x_data + task * bytes, bias_row.const_data_ptr(), out_data + task * bytes, rows.rows_of(task), rows.dim});
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_tanh_backward(const Tensor& grad,    // [..., D]
                                              const Tensor& x,       // [..., D]
                                              const Tensor& bias) {  // [D]
  const char* self = "gelu_tanh_backward";
  const Rows rows = check(self, x, bias);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type(), self,
                  ": grad has shape ", shape_of(grad), ", expected shape and dtype of x, ", shape_of(x));
  const Storage storage = storage_of(x, self);
  const auto kernel = PYARD_SELECT(gelu_tanh_backward)(storage);
  const Tensor grad_rows = torch::stable::contiguous(grad), x_rows = torch::stable::contiguous(x);
  const Tensor bias_row = torch::stable::contiguous(bias);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  const int64_t partial_sizes[] = {rows.tasks(), rows.dim};
  Tensor dbias = torch::stable::new_zeros(x, {partial_sizes, 2}, accumulator_of(storage));
  const char* grad_data = static_cast<const char*>(grad_rows.const_data_ptr());
  const char* x_data = static_cast<const char*>(x_rows.const_data_ptr());
  char* dx_data = static_cast<char*>(dx.mutable_data_ptr());
  char* dbias_data = static_cast<char*>(dbias.mutable_data_ptr());
  const int64_t bytes = kRowsPerTask * rows.dim * static_cast<int64_t>(x.element_size());
  const int64_t dbias_bytes = rows.dim * static_cast<int64_t>(dbias.element_size());

  torch::stable::parallel_for(0, rows.tasks(), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      kernel({grad_data + task * bytes, x_data + task * bytes, bias_row.const_data_ptr(), dx_data + task * bytes,
              dbias_data + task * dbias_bytes, rows.rows_of(task), rows.dim});
    }
  });
  const int64_t tasks_dim = 0;
  const Tensor total = torch::stable::sum(dbias, torch::headeronly::IntHeaderOnlyArrayRef(&tasks_dim, 1));
  return {dx, torch::stable::to(total, x.scalar_type())};
}

}  // namespace pyard::cpu
