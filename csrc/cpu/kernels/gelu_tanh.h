// Some rows of a linear layer's output before its bias. Pointers lead to the storage type of the chosen kernel unless
// it is said otherwise; rows are contiguous and follow each other.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pyard::cpu {

struct GeluRows {
  const void* x;     // [rows, dim]
  const void* bias;  // [dim]
  void* out;         // [rows, dim]
  int64_t rows;
  int64_t dim;
};

struct GeluBackwardRows {
  const void* grad;  // [rows, dim]
  const void* x;     // [rows, dim]
  const void* bias;  // [dim]
  void* dx;          // [rows, dim]
  void* dbias;       // [dim], accumulator type; added to
  int64_t rows;
  int64_t dim;
};

using GeluKernel = void (*)(const GeluRows&);
using GeluBackwardKernel = void (*)(const GeluBackwardRows&);

#define PYARD_DECLARE_KERNELS(isa)                        \
  namespace isa {                                         \
  GeluKernel gelu_tanh(Storage storage);                  \
  GeluBackwardKernel gelu_tanh_backward(Storage storage); \
  }
PYARD_DECLARE_KERNELS(baseline)
PYARD_DECLARE_KERNELS(avx2)
PYARD_DECLARE_KERNELS(avx512)
#undef PYARD_DECLARE_KERNELS

}  // namespace pyard::cpu
