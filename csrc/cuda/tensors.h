// Between torch's tensors and the launchers: checks, views as pointer and strides, device, stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <limits>

#include "cuda/launchers.h"
#include "cuda/scalars.h"

namespace pyard::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that torch queues work of this device on. torch's function for it lives in libtorch_cuda, which a torch
// without CUDA does not have and this library must load without: it is looked up when the first kernel runs.
void* current_stream(int32_t device);

// Selects x's device while it lives, and launches on its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {}

  template <typename Arguments>
  void run(const char* operator_name, const char* (*launcher)(const Arguments*, void*),
           const Arguments& arguments) const {
    const char* error = launcher(&arguments, stream_);
    STD_TORCH_CHECK(error == nullptr, operator_name, ": ", error);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

inline int scalar_of(ScalarType dtype, const char* operator_name) {
  switch (dtype) {
    case ScalarType::Float:
      return static_cast<int>(Scalar::float32);
    case ScalarType::BFloat16:
      return static_cast<int>(Scalar::bfloat16);
    case ScalarType::Half:
      return static_cast<int>(Scalar::float16);
    default:
      STD_TORCH_CHECK(false, operator_name, ": dtype ", torch::headeronly::toString(dtype),
                      " has no CUDA kernel, expected float32, bfloat16 or float16");
  }
  return 0;
}

// A size that the kernels hold in 32 bits.
inline int small(int64_t size, const char* operator_name) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int>::max(), operator_name, ": a size of ", size, " is too large");
  return static_cast<int>(size);
}

// An operator is dispatched to CUDA as soon as one of its tensors is there: a pointer of the CPU must not pass for one.
inline void check_device(const Tensor& tensor, const Tensor& like, const char* operator_name, const char* argument) {
  STD_TORCH_CHECK(like.is_cuda() && tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(),
                  operator_name, ": ", argument, " is on GPU ", tensor.is_cuda() ? tensor.get_device_index() : -1,
                  ", the first argument on GPU ", like.is_cuda() ? like.get_device_index() : -1,
                  " (-1: none); expected the same: move them with .to()");
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* operator_name, const char* argument) {
  check_device(tensor, like, operator_name, argument);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), operator_name, ": ", argument, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(like.scalar_type()));
}

// x itself where its rows are contiguous and start at multiples of 16 bytes (slices of fused projections do), else a
// copy.
inline Tensor with_aligned_rows(const Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size()), last = x.dim() - 1;
  const auto starts_aligned = [](const Tensor& y) { return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0; };
  bool aligned = starts_aligned(x) && (x.size(last) <= 1 || x.stride(last) == 1);
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) * bytes % 16 == 0);
  if (aligned) return x;
  const Tensor copy = torch::stable::contiguous(x);  // x itself where only its start is not aligned
  return starts_aligned(copy) ? copy : torch::stable::clone(copy);
}

inline void* data_of(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

inline Tokens tokens(const Tensor& x) { return {data_of(x), x.stride(0), x.stride(1), x.stride(2)}; }  // [B, S, T, D]
inline PerStep per_step(const Tensor& x) { return {data_of(x), x.stride(0), x.stride(1)}; }            // [B, S, D]
inline Heads heads(const Tensor& x) { return {data_of(x), x.stride(0), x.stride(1), x.stride(2)}; }  // [B, H, rows, Dh]

}  // namespace pyard::cuda
