// Every operator's schema, once, and the kernels of the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(pyard, m) {
  m.def("modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def(
      "modulated_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor dx, Tensor dshift, "
      "Tensor dscale)");

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
      "int tokens_per_step, str mask, int? window, Tensor? bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(pyard, CPU, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&pyard::cpu::modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&pyard::cpu::modulated_layer_norm_backward));
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
