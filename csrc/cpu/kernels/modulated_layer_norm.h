// The rows of one (sample, step): T tokens that share shift and scale. Pointers lead to the storage type of the chosen
// kernel; strides count elements; the hidden dimension is contiguous everywhere.
//
// x, the residual and their gradients may be float32 where all else has 16 bits (`stream` and `other` below), as
// autocast leaves a float32 network.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pyard::cpu {

struct ModulatedLayerNormRows {
  const void* x;  // [rows, dim]
  int64_t x_stride;
  const void* shift;  // [dim]
  const void* scale;  // [dim]
  void* out;          // [rows, dim]
  int64_t out_stride;
  int64_t rows;
  int64_t dim;
  double eps;
};

struct ModulatedLayerNormBackwardRows {
  const void* grad;  // [rows, dim]
  int64_t grad_stride;
  const void* x;  // [rows, dim]
  int64_t x_stride;
  const void* scale;  // [dim]
  void* dx;           // [rows, dim]
  int64_t dx_stride;
  void* dshift;  // [dim], accumulator type; added to
  void* dscale;  // [dim], accumulator type; added to
  int64_t rows;
  int64_t dim;
  double eps;
};

using ModulatedLayerNormKernel = void (*)(const ModulatedLayerNormRows&);
using ModulatedLayerNormBackwardKernel = void (*)(const ModulatedLayerNormBackwardRows&);

#define PYARD_DECLARE_KERNELS(isa)                                                               \
  namespace isa {                                                                                \
  ModulatedLayerNormKernel modulated_layer_norm(Storage stream, Storage other);                  \
  ModulatedLayerNormBackwardKernel modulated_layer_norm_backward(Storage stream, Storage other); \
  }
PYARD_DECLARE_KERNELS(baseline)
PYARD_DECLARE_KERNELS(avx2)
PYARD_DECLARE_KERNELS(avx512)
#undef PYARD_DECLARE_KERNELS

}  // namespace pyard::cpu
