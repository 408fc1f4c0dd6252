// The rows of one (sample, step): T tokens that share a gate. Pointers lead to the storage type of the chosen kernel
// unless it is said otherwise; strides count elements; the hidden dimension is contiguous everywhere.
//
// x, the residual and their gradients may be float32 where all else has 16 bits (`stream` and `other` below), as
// autocast leaves a float32 network.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pyard::cpu {

struct GatedResidualRows {
  const void* x;  // [rows, dim]
  int64_t x_stride;
  const void* gate;    // [dim]
  const void* branch;  // [rows, dim]
  int64_t branch_stride;
  void* out;  // [rows, dim]
  int64_t out_stride;
  int64_t rows;
  int64_t dim;
};

struct GatedResidualBackwardRows {
  const void* grad;  // [rows, dim]
  int64_t grad_stride;
  const void* gate;    // [dim]
  const void* branch;  // [rows, dim]
  int64_t branch_stride;
  void* dbranch;  // [rows, dim]
  int64_t dbranch_stride;
  void* dgate;  // [dim], accumulator type; added to
  int64_t rows;
  int64_t dim;
};

using GatedResidualKernel = void (*)(const GatedResidualRows&);
using GatedResidualBackwardKernel = void (*)(const GatedResidualBackwardRows&);

#define PYARD_DECLARE_KERNELS(isa)                                                    \
  namespace isa {                                                                     \
  GatedResidualKernel gated_residual(Storage stream, Storage other);                  \
  GatedResidualBackwardKernel gated_residual_backward(Storage stream, Storage other); \
  }
PYARD_DECLARE_KERNELS(baseline)
PYARD_DECLARE_KERNELS(avx2)
PYARD_DECLARE_KERNELS(avx512)
#undef PYARD_DECLARE_KERNELS

}  // namespace pyard::cpu
