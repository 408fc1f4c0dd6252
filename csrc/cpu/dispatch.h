// Chooses, at run time, the widest instruction set that the kernels were compiled for and the processor has.
#pragma once

namespace pyard::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

// PYARD_CPU_ISA=baseline|avx2|avx512 asks for a narrower one than the processor has (read once).
InstructionSet active_instruction_set();

const char* name(InstructionSet isa);
const char* built_instruction_sets();

// The variant of a kernel for the active instruction set.
template <typename Kernel>
Kernel select(Kernel baseline, Kernel avx2, Kernel avx512) {
  switch (active_instruction_set()) {
    case InstructionSet::avx512:
      return avx512;
    case InstructionSet::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace pyard::cpu

#ifdef PYARD_HAS_avx2
#define PYARD_SELECT(kernel) \
  ::pyard::cpu::select(&::pyard::cpu::baseline::kernel, &::pyard::cpu::avx2::kernel, &::pyard::cpu::avx512::kernel)
#else
#define PYARD_SELECT(kernel) (&::pyard::cpu::baseline::kernel)
#endif
