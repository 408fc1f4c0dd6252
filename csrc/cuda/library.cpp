// Registers the kernels of CUDA; the schemas are in csrc/library.cpp.
#include <torch/csrc/stable/library.h>

#include "cuda/operators.h"

STABLE_TORCH_LIBRARY_IMPL(pyard, CUDA, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&pyard::cuda::modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&pyard::cuda::modulated_layer_norm_backward));
  m.impl("gated_residual", TORCH_BOX(&pyard::cuda::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&pyard::cuda::gated_residual_backward));
  m.impl("gated_residual_modulated_layer_norm", TORCH_BOX(&pyard::cuda::gated_residual_modulated_layer_norm));
  m.impl("gated_residual_modulated_layer_norm_backward",
         TORCH_BOX(&pyard::cuda::gated_residual_modulated_layer_norm_backward));
  m.impl("block_attention", TORCH_BOX(&pyard::cuda::block_attention));
  m.impl("block_attention_backward", TORCH_BOX(&pyard::cuda::block_attention_backward));
  m.impl("block_attention_backward_unordered", TORCH_BOX(&pyard::cuda::block_attention_backward_unordered));
  m.impl("gelu_tanh", TORCH_BOX(&pyard::cuda::gelu_tanh));
  m.impl("gelu_tanh_backward", TORCH_BOX(&pyard::cuda::gelu_tanh_backward));
  m.impl("timestep_embedding", TORCH_BOX(&pyard::cuda::timestep_embedding));
  m.impl("gather_trajectories", TORCH_BOX(&pyard::cuda::gather_trajectories));
}
