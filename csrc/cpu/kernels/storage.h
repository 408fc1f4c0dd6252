// The storage types that the CPU kernels take.
#pragma once

namespace pyard::cpu {

enum class Storage { float32, float64, bfloat16, float16 };

}  // namespace pyard::cpu
