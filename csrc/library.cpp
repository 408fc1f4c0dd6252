// Every operator's schema, once, and the kernels of the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(pyard, m) {
  m.def("modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def(
      "modulated_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor dx, Tensor dshift, "
      "Tensor dscale)");
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, int tokens_per_step, int mask, int? window, Tensor? bias) -> "
      "(Tensor out, Tensor log_sum_exp)");
  m.def(
      "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp, int "
      "tokens_per_step, int mask, int? window, Tensor? bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  m.def("gated_residual(Tensor x, Tensor gate, Tensor branch) -> Tensor");
  m.def("gated_residual_backward(Tensor grad, Tensor gate, Tensor branch) -> (Tensor dgate, Tensor dbranch)");
  m.def("gelu_tanh(Tensor x, Tensor bias) -> Tensor");
  m.def("gelu_tanh_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");
  m.def("timestep_embedding(Tensor times, int dim, float max_period, float freq_shift) -> Tensor");
  m.def(
      "gather_trajectories(Tensor noise, Tensor steps, Tensor indices, ScalarType dtype) -> (Tensor history, Tensor "
      "target)");

  // CUDA alone; elsewhere pyard.ops composes them.
  m.def(
      "gated_residual_modulated_layer_norm(Tensor x, Tensor gate, Tensor branch, Tensor shift, Tensor scale, float "
      "eps) -> (Tensor residual, Tensor normal)");
  m.def(
      "gated_residual_modulated_layer_norm_backward(Tensor grad_residual, Tensor grad_normal, Tensor residual, Tensor "
      "gate, Tensor branch, Tensor scale, float eps) -> (Tensor dx, Tensor dgate, Tensor dbranch, Tensor dshift, "
      "Tensor dscale)");
  m.def(
      "block_attention_backward_unordered(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp, "
      "int tokens_per_step, int mask, int? window, Tensor? bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(pyard, CPU, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&pyard::cpu::modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&pyard::cpu::modulated_layer_norm_backward));
  m.impl("block_attention", TORCH_BOX(&pyard::cpu::block_attention));
  m.impl("block_attention_backward", TORCH_BOX(&pyard::cpu::block_attention_backward));
  m.impl("gated_residual", TORCH_BOX(&pyard::cpu::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&pyard::cpu::gated_residual_backward));
  m.impl("gelu_tanh", TORCH_BOX(&pyard::cpu::gelu_tanh));
  m.impl("gelu_tanh_backward", TORCH_BOX(&pyard::cpu::gelu_tanh_backward));
  m.impl("timestep_embedding", TORCH_BOX(&pyard::cpu::timestep_embedding));
  m.impl("gather_trajectories", TORCH_BOX(&pyard::cpu::gather_trajectories));
}

// Read by `pyard doctor` through ctypes: facts about the binary that no operator can return.
extern "C" {
__attribute__((visibility("default"))) const char* pyard_built_with_torch() { return TORCH_VERSION; }
__attribute__((visibility("default"))) const char* pyard_built_instruction_sets() {
  return pyard::cpu::built_instruction_sets();
}
__attribute__((visibility("default"))) const char* pyard_active_instruction_set() {
  return pyard::cpu::name(pyard::cpu::active_instruction_set());
}
__attribute__((visibility("default"))) const char* pyard_compiler() { return __VERSION__; }
// Empty where the CUDA kernels were not compiled.
__attribute__((visibility("default"))) const char* pyard_built_cuda_architectures() {
#ifdef PYARD_HAS_CUDA
  return PYARD_CUDA_ARCHS;
#else
  return "";
#endif
}
}
