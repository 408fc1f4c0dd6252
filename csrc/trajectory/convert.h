// Copies rows of floating-point numbers from one dtype to another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "trajectory/shard.h"

namespace pyard::trajectory {

// `count` numbers from `source` (any alignment) to `target`. To float32 exactly; from float32 to a narrower dtype to
// nearest, ties to even, as torch does.
using Convert = void (*)(const uint8_t* source, uint8_t* target, size_t count);

// Throws InputError for float16 <-> bfloat16 and for int64, which no store needs.
Convert converter(DType from, DType to);

}  // namespace pyard::trajectory
