// The masks M1-M4 of pyard/ops/masks.py as ranges of steps.
#pragma once

#include <cstdint>

namespace pyard::cpu {

// In the order of pyard.ops.masks.MASKS.
enum class Mask : int64_t { diagonal, window, anchor, causal };

// The query steps are the last of the key steps.
struct BlockMask {
  Mask mask;
  int64_t window;
  int64_t query_steps;
  int64_t key_steps;
};

struct Steps {
  int64_t begin;
  int64_t end;
};

namespace {  // what kernel files inline must not be shared between instruction sets, see vec.h

// The earlier steps whose keys the queries of `step` see; they also see their own.
inline Steps earlier_steps(const BlockMask& mask, int64_t step) {
  switch (mask.mask) {
    case Mask::diagonal:
      return {step, step};
    case Mask::window:
      return {step < mask.window ? 0 : step - mask.window + 1, step};
    case Mask::anchor:
      return {0, step > 0 ? 1 : 0};
    default:
      return {0, step};
  }
}

// The steps whose queries see the keys of `step`.
inline Steps steps_that_see(const BlockMask& mask, int64_t step) {
  const int64_t first = mask.key_steps - mask.query_steps;
  int64_t end = mask.key_steps;
  if (mask.mask == Mask::diagonal || (mask.mask == Mask::anchor && step > 0)) end = step + 1;
  if (mask.mask == Mask::window && mask.window < end - step) end = step + mask.window;
  const int64_t begin = step > first ? step : first;
  return {begin, end > begin ? end : begin};
}

}  // namespace
}  // namespace pyard::cpu
