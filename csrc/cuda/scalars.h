// Storage types of the kernels. Arithmetic is float32 throughout.
#pragma once

#include <cstdint>

namespace pyard::cuda {

enum class Scalar : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// What one memory instruction of a thread moves.
struct alignas(16) Chunk {
  uint32_t words[4];
};

template <typename T>
inline constexpr int kPerChunk = static_cast<int>(16 / sizeof(T));

}  // namespace pyard::cuda
