// libFuzzer target: whatever bytes a shard's file holds, its parser says no or gives tensors that lie within the file.
#include <cstdlib>

#include "trajectory/shard.h"

using pyard::trajectory::DType;
using pyard::trajectory::InputError;
using pyard::trajectory::TensorLayout;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<TensorLayout> layout = {
      {"label", DType::kInt64, {2}},
      {"noise", DType::kFloat32, {2, 1, 2, 2}},
      {"state", DType::kBFloat16, {2, 3, 1, 2, 2}},
  };
  std::vector<uint64_t> begins;
  try {
    begins = parse_shard(data, size, layout);
  } catch (const InputError&) {
    return 0;
  }
  uint64_t total = 0;
  for (size_t i = 0; i < layout.size(); ++i) {
    const uint64_t bytes = layout[i].num_bytes();
    if (begins[i] > size || size - begins[i] < bytes) std::abort();
    for (size_t j = 0; j < i; ++j) {
      if (begins[i] < begins[j] + layout[j].num_bytes() && begins[j] < begins[i] + bytes) std::abort();
    }
    total += bytes;
  }
  if (total > size) std::abort();
  // Every byte of every tensor can be read: AddressSanitizer watches.
  volatile uint8_t sum = 0;
  for (size_t i = 0; i < layout.size(); ++i) {
    for (uint64_t k = 0; k < layout[i].num_bytes(); ++k) sum = sum + data[begins[i] + k];
  }
  return 0;
}
