#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyard::cpu {

namespace {

InstructionSet widest_of_processor() {
#ifdef PYARD_HAS_avx2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet choose() {
  const InstructionSet widest = widest_of_processor();
  const char* wish = std::getenv("PYARD_CPU_ISA");
  if (wish == nullptr) return widest;
  for (InstructionSet isa : {InstructionSet::baseline, InstructionSet::avx2}) {
    if (isa < widest && std::strcmp(wish, name(isa)) == 0) return isa;
  }
  return widest;
}

}  // namespace

InstructionSet active_instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* name(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

const char* built_instruction_sets() {
#ifdef PYARD_HAS_avx2
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

}  // namespace pyard::cpu
