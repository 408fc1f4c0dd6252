// How operators on [B, S, T, D] tokens with [B, S, D] conditionings split their work.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace pyard::cpu {

// Rows of one (sample, step) that one task takes. A constant, and not a share of the threads, so that the order of the
// sums in dshift and dscale, and with it every bit of them, is the same for any number of threads.
inline constexpr int64_t kRowsPerTask = 64;

// Work, in elements, below which a second thread costs more than it brings.
inline constexpr int64_t kElementsPerThread = 16384;

struct Sizes {
  int64_t B, S, T, D;
  int64_t tasks_per_step() const { return (T + kRowsPerTask - 1) / kRowsPerTask; }
  int64_t tasks() const { return B * S * tasks_per_step(); }
  int64_t grain() const { return std::max<int64_t>(1, kElementsPerThread / (std::min(T, kRowsPerTask) * D + 1)); }
};

// Where task `index` works: its sample, step, first token and number of tokens.
struct Task {
  Task(const Sizes& sizes, int64_t index)
      : b(index / sizes.tasks_per_step() / sizes.S),
        s(index / sizes.tasks_per_step() % sizes.S),
        first(index % sizes.tasks_per_step() * kRowsPerTask),
        rows(std::min(kRowsPerTask, sizes.T - first)) {}
  int64_t b, s, first, rows;
};

// A tensor's data with the strides of its leading dimensions. Strides count elements, the pointer bytes.
class Strided {
 public:
  Strided(const Tensor& tensor, bool writable)
      : data_(static_cast<char*>(writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()))),
        bytes_(static_cast<int64_t>(tensor.element_size())) {
    for (int64_t i = 0; i < tensor.dim() && i < 3; ++i) strides_[i] = tensor.stride(i);
  }
  char* at(int64_t b, int64_t s) const { return data_ + (b * strides_[0] + s * strides_[1]) * bytes_; }
  char* at(int64_t b, int64_t s, int64_t t) const { return at(b, s) + t * strides_[2] * bytes_; }
  int64_t token_stride() const { return strides_[2]; }

 private:
  char* data_;
  int64_t bytes_;
  int64_t strides_[3] = {0, 0, 0};
};

inline Sizes sizes_of(const Tensor& x, const char* operator_name) {
  STD_TORCH_CHECK(x.dim() == 4, operator_name, ": x has shape ", shape_of(x), ", expected [B, S, T, D]");
  STD_TORCH_CHECK(x.size(3) > 0, operator_name, ": the hidden size D is 0, expected at least 1");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// The storage of what is beside a stream x: that of x, or 16 bits beside float32.
inline Storage storage_beside(const Tensor& tensor, const Tensor& x, const char* operator_name, const char* argument) {
  const Storage stream = storage_of(x, operator_name), other = storage_of(tensor, operator_name);
  const bool narrow = other == Storage::bfloat16 || other == Storage::float16;
  STD_TORCH_CHECK(other == stream || (stream == Storage::float32 && narrow), operator_name, ": ", argument,
                  " has dtype ", torch::headeronly::toString(tensor.scalar_type()), ", expected that of x, ",
                  torch::headeronly::toString(x.scalar_type()), ", or 16 bits beside float32");
  return other;
}

// `x` is what the dtype is compared with.
inline void check_like(const Tensor& tensor, const Tensor& x, const char* operator_name, const char* argument) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), operator_name, ": ", argument, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected that of x, ",
                  torch::headeronly::toString(x.scalar_type()));
}

inline Tensor sum_over_tasks(const Tensor& partial,  // [B, S, tasks_per_step, D]
                             ScalarType dtype) {     // returns [B, S, D]
  const int64_t tasks_dim = 2;
  return torch::stable::to(torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&tasks_dim, 1)), dtype);
}

}  // namespace pyard::cpu
