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
      "block_attention(Tensor q, Tensor k, Tensor v, int tokens_per_step, str mask, int? window, Tensor? bias) -> "
      "(Tensor out, Tensor log_sum_exp)");
  m.def(
      "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp, int "
      "tokens_per_step, str mask, int? window, Tensor? bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(pyard, CPU, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&pyard::cpu::modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&pyard::cpu::modulated_layer_norm_backward));
  m.impl("block_attention", TORCH_BOX(&pyard::cpu::block_attention));
  m.impl("block_attention_backward", TORCH_BOX(&pyard::cpu::block_attention_backward));
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
}
