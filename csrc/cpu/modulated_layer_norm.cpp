#include "kernels/modulated_layer_norm.h"

#include "dispatch.h"
#include "ops.h"
#include "step_rows.h"

namespace pyard::cpu {

Tensor modulated_layer_norm(const Tensor& x,      // [B, S, T, D]
                            const Tensor& shift,  // [B, S, D]
                            const Tensor& scale,  // [B, S, D]
                            double eps) {
  const char* self = "modulated_layer_norm";
  const Sizes sizes = sizes_of(x, self);
  check_shape(shift, self, "shift", {sizes.B, sizes.S, sizes.D});
  check_shape(scale, self, "scale", {sizes.B, sizes.S, sizes.D});
  const Storage other = storage_beside(scale, x, self, "scale");
  check_like(shift, scale, self, "shift");
  const auto kernel = PYARD_SELECT(modulated_layer_norm)(storage_of(x, self), other);

  const Tensor x_rows = with_contiguous_rows(x);
  const Tensor shift_rows = with_contiguous_rows(shift);
  const Tensor scale_rows = with_contiguous_rows(scale);
  Tensor out = torch::stable::new_empty(scale, x.sizes());
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
  const Storage storage = storage_of(x, self), other = storage_beside(scale, x, self, "scale");
  check_like(grad, scale, self, "grad");
  const auto kernel = PYARD_SELECT(modulated_layer_norm_backward)(storage, other);

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

  return {dx, sum_over_tasks(dshift, scale.scalar_type()), sum_over_tasks(dscale, scale.scalar_type())};
}

}  // namespace pyard::cpu
