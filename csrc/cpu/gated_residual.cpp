#include "kernels/gated_residual.h"

#include "dispatch.h"
#include "ops.h"
#include "step_rows.h"

namespace pyard::cpu {

Tensor gated_residual(const Tensor& x,         // [B, S, T, D]
                      const Tensor& gate,      // [B, S, D]
                      const Tensor& branch) {  // [B, S, T, D]
  const char* self = "gated_residual";
  const Sizes sizes = sizes_of(x, self);
  check_shape(gate, self, "gate", {sizes.B, sizes.S, sizes.D});
  check_shape(branch, self, "branch", {sizes.B, sizes.S, sizes.T, sizes.D});
  const Storage other = storage_beside(gate, x, self, "gate");
  check_like(branch, gate, self, "branch");
  const auto kernel = PYARD_SELECT(gated_residual)(storage_of(x, self), other);

  const Tensor x_rows = with_contiguous_rows(x), gate_rows = with_contiguous_rows(gate);
  const Tensor branch_rows = with_contiguous_rows(branch);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const Strided x_at(x_rows, false), gate_at(gate_rows, false), branch_at(branch_rows, false), out_at(out, true);

  torch::stable::parallel_for(0, sizes.tasks(), sizes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task(sizes, index);
      kernel({x_at.at(task.b, task.s, task.first), x_at.token_stride(), gate_at.at(task.b, task.s),
              branch_at.at(task.b, task.s, task.first), branch_at.token_stride(), out_at.at(task.b, task.s, task.first),
              out_at.token_stride(), task.rows, sizes.D});
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad,      // [B, S, T, D]
                                                   const Tensor& gate,      // [B, S, D]
                                                   const Tensor& branch) {  // [B, S, T, D]
  const char* self = "gated_residual_backward";
  const Sizes sizes = sizes_of(branch, self);
  check_shape(grad, self, "grad", {sizes.B, sizes.S, sizes.T, sizes.D});
  check_shape(gate, self, "gate", {sizes.B, sizes.S, sizes.D});
  const Storage storage = storage_of(grad, self), other = storage_beside(gate, grad, self, "gate");
  check_like(branch, gate, self, "branch");
  const auto kernel = PYARD_SELECT(gated_residual_backward)(storage, other);

  const Tensor grad_rows = with_contiguous_rows(grad), gate_rows = with_contiguous_rows(gate);
  const Tensor branch_rows = with_contiguous_rows(branch);
  Tensor dbranch = torch::stable::new_empty(branch, branch.sizes());
  // One partial sum per task: [B, S, tasks_per_step, D].
  const int64_t partial_sizes[] = {sizes.B, sizes.S, sizes.tasks_per_step(), sizes.D};
  const Tensor dgate = torch::stable::new_zeros(branch, {partial_sizes, 4}, accumulator_of(storage));
  const Strided grad_at(grad_rows, false), gate_at(gate_rows, false), branch_at(branch_rows, false);
  const Strided dbranch_at(dbranch, true);
  char* dgate_data = static_cast<char*>(dgate.mutable_data_ptr());
  const int64_t bytes_per_task = sizes.D * static_cast<int64_t>(dgate.element_size());

  torch::stable::parallel_for(0, sizes.tasks(), sizes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task(sizes, index);
      kernel({grad_at.at(task.b, task.s, task.first), grad_at.token_stride(), gate_at.at(task.b, task.s),
              branch_at.at(task.b, task.s, task.first), branch_at.token_stride(),
              dbranch_at.at(task.b, task.s, task.first), dbranch_at.token_stride(), dgate_data + index * bytes_per_task,
              task.rows, sizes.D});
    }
  });
  return {sum_over_tasks(dgate, branch.scalar_type()), dbranch};
}

}  // namespace pyard::cpu
