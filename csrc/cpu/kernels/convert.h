// Numbers of one storage type written as numbers of another, through float32; null where one of them is float64.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pyard::cpu {

using ConvertKernel = void (*)(const void* in, void* out, int64_t count);

#define PYARD_DECLARE_KERNELS(isa)                 \
  namespace isa {                                  \
  ConvertKernel convert(Storage from, Storage to); \
  }
PYARD_DECLARE_KERNELS(baseline)
PYARD_DECLARE_KERNELS(avx2)
PYARD_DECLARE_KERNELS(avx512)
#undef PYARD_DECLARE_KERNELS

}  // namespace pyard::cpu
