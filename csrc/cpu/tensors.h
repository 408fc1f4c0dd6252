// What every CPU kernel asks of its tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

#include "kernels/storage.h"

namespace pyard::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << "]";
  return text.str();
}

inline void check_shape(const Tensor& tensor, const char* operator_name, const char* argument,
                        std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) same = same && tensor.size(i++) == size;
  if (same) return;
  std::ostringstream text;
  for (const int64_t* size = expected.begin(); size != expected.end(); ++size) {
    text << (size == expected.begin() ? "" : ", ") << *size;
  }
  STD_TORCH_CHECK(false, operator_name, ": ", argument, " has shape ", shape_of(tensor), ", expected [", text.str(),
                  "]");
}

// x itself where the last dimension is contiguous (slices of a fused projection are), else a copy.
inline Tensor with_contiguous_rows(const Tensor& x) {
  const bool contiguous_rows = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return contiguous_rows ? x : torch::stable::contiguous(x);
}

inline Storage storage_of(const Tensor& x, const char* operator_name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      STD_TORCH_CHECK(false, operator_name, ": dtype ", torch::headeronly::toString(x.scalar_type()),
                      " is not supported, expected float32, float64, bfloat16 or float16");
  }
  return Storage::float32;
}

// The dtype that a storage is accumulated in.
inline ScalarType accumulator_of(Storage storage) {
  return storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pyard::cpu
