#include "kernels/modulated_layer_norm.h"

#include <algorithm>

#include "dispatch.h"
#include "ops.h"
#include "tensors.h"

namespace pyard::cpu {

namespace {

// Rows of one (sample, step) that one task takes. A constant, and not a share of the threads, so that the order of the
// sums in dshift and dscale, and with it every bit of them, is the same for any number of threads.
constexpr int64_t kRowsPerTask = 64;

// Work, in elements, below which a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

struct Sizes {
  int64_t B, S, T, D;
  int64_t tasks_per_step() const { return (T + kRowsPerTask - 1) / kRowsPerTask; }
  int64_t tasks() const { return B * S * tasks_per_step(); }
  int64_t grain() const { return std::max<int64_t>(1, kElementsPerThread / (std::min(T, kRowsPerTask) * D + 1)); }
};

// Where task `index` works: its sample, step, first token and number of tokens.
struct Task {
  Task(const Sizes& sizes, int64_t index)
      : b(index / sizes.tasks_per_step() / sizes.S),
        s(index / sizes.tasks_per_step() % sizes.S),
        first(index % sizes.tasks_per_step() * kRowsPerTask),
        rows(std::min(kRowsPerTask, sizes.T - first)) {}
  int64_t b, s, first, rows;
};

// A tensor's data with the strides of its leading dimensions. Strides count elements, the pointer bytes.
class Strided {
 public:
  Strided(const Tensor& tensor, bool writable)
      : data_(static_cast<char*>(writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()))),
        bytes_(static_cast<int64_t>(tensor.element_size())) {
    for (int64_t i = 0; i < tensor.dim() && i < 3; ++i) strides_[i] = tensor.stride(i);
  }
  char* at(int64_t b, int64_t s) const { return data_ + (b * strides_[0] + s * strides_[1]) * bytes_; }
  char* at(int64_t b, int64_t s, int64_t t) const { return at(b, s) + t * strides_[2] * bytes_; }
  int64_t token_stride() const { return strides_[2]; }

 private:
  char* data_;
  int64_t bytes_;
  int64_t strides_[3] = {0, 0, 0};
};

Sizes sizes_of(const Tensor& x, const char* operator_name) {
  STD_TORCH_CHECK(x.dim() == 4, operator_name, ": x has shape ", shape_of(x), ", expected [B, S, T, D]");
  STD_TORCH_CHECK(x.size(3) > 0, operator_name, ": the hidden size D is 0, expected at least 1");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

void check_like(const Tensor& tensor, const Tensor& x, const char* operator_name, const char* argument) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), operator_name, ": ", argument, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected that of x, ",
                  torch::headeronly::toString(x.scalar_type()));
}

Tensor sum_over_tasks(const Tensor& partial,  // [B, S, tasks_per_step, D]
                      ScalarType dtype) {     // returns [B, S, D]
  const int64_t tasks_dim = 2;
  return torch::stable::to(torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&tasks_dim, 1)), dtype);
}

}  // namespace

Tensor modulated_layer_norm(const Tensor& x,      // [B, S, T, D]
                            const Tensor& shift,  // [B, S, D]
                            const Tensor& scale,  // [B, S, D]
                            double eps) {
  const char* self = "modulated_layer_norm";
  const Sizes sizes = sizes_of(x, self);
  check_shape(shift, self, "shift", {sizes.B, sizes.S, sizes.D});
  check_shape(scale, self, "scale", {sizes.B, sizes.S, sizes.D});
  check_like(shift, x, self, "shift");
  check_like(scale, x, self, "scale");
  const auto kernel = PYARD_SELECT(modulated_layer_norm)(storage_of(x, self));

  const Tensor x_rows = with_contiguous_rows(x);
  const Tensor shift_rows = with_contiguous_rows(shift);
  const Tensor scale_rows = with_contiguous_rows(scale);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const Strided x_at(x_rows, false), shift_at(shift_rows, false), scale_at(scale_rows, false), out_at(out, true);

  torch::stable::parallel_for(0, sizes.tasks(), sizes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task(sizes, index);
      kernel({x_at.at(task.b, task.s, task.first), x_at.token_stride(), shift_at.at(task.b, task.s),
              scale_at.at(task.b, task.s), out_at.at(task.b, task.s, task.first), out_at.token_stride(), task.rows,
              sizes.D, eps});
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad,   // [B, S, T, D]
                                                                 const Tensor& x,      // [B, S, T, D]
                                                                 const Tensor& scale,  // [B, S, D]
                                                                 double eps) {
  const char* self = "modulated_layer_norm_backward";
  const Sizes sizes = sizes_of(x, self);
  check_shape(grad, self, "grad", {sizes.B, sizes.S, sizes.T, sizes.D});
  check_shape(scale, self, "scale", {sizes.B, sizes.S, sizes.D});
  check_like(grad, x, self, "grad");
  check_like(scale, x, self, "scale");
  const Storage storage = storage_of(x, self);
  const auto kernel = PYARD_SELECT(modulated_layer_norm_backward)(storage);

  const Tensor grad_rows = with_contiguous_rows(grad);
  const Tensor x_rows = with_contiguous_rows(x);
  const Tensor scale_rows = with_contiguous_rows(scale);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  // One partial sum per task: [B, S, tasks_per_step, D].
  const int64_t partial_sizes[] = {sizes.B, sizes.S, sizes.tasks_per_step(), sizes.D};
  const Tensor dshift = torch::stable::new_zeros(x, {partial_sizes, 4}, accumulator_of(storage));
  const Tensor dscale = torch::stable::new_zeros(x, {partial_sizes, 4}, accumulator_of(storage));
  const Strided grad_at(grad_rows, false), x_at(x_rows, false), scale_at(scale_rows, false), dx_at(dx, true);
  char* dshift_data = static_cast<char*>(dshift.mutable_data_ptr());
  char* dscale_data = static_cast<char*>(dscale.mutable_data_ptr());
  const int64_t bytes_per_task = sizes.D * static_cast<int64_t>(dshift.element_size());

  torch::stable::parallel_for(0, sizes.tasks(), sizes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task(sizes, index);
      kernel({grad_at.at(task.b, task.s, task.first), grad_at.token_stride(), x_at.at(task.b, task.s, task.first),
              x_at.token_stride(), scale_at.at(task.b, task.s), dx_at.at(task.b, task.s, task.first),
              dx_at.token_stride(), dshift_data + index * bytes_per_task, dscale_data + index * bytes_per_task,
              task.rows, sizes.D, eps});
    }
  });

  return {dx, sum_over_tasks(dshift, x.scalar_type()), sum_over_tasks(dscale, x.scalar_type())};
}

}  // namespace pyard::cpu
