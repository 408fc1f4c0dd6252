#include <cmath>
#include <vector>

#include "ops.h"
#include "tensors.h"

namespace pyard::cpu {

Tensor timestep_embedding(const Tensor& times,  // [...] float32
                          int64_t dim, double max_period, double freq_shift) {
  const char* self = "timestep_embedding";
  STD_TORCH_CHECK(times.scalar_type() == ScalarType::Float, self, ": times has dtype ",
                  torch::headeronly::toString(times.scalar_type()), ", expected float32");
  const int64_t half = dim / 2;
  STD_TORCH_CHECK(dim >= 2 && static_cast<double>(half) > freq_shift, self, ": dim is ", dim,
                  ", expected at least 2 and dim // 2 > freq_shift = ", freq_shift);
  const Tensor flat = torch::stable::contiguous(times);
  std::vector<int64_t> sizes(times.sizes().begin(), times.sizes().end());
  sizes.push_back(dim);
  Tensor out = torch::stable::new_empty(times, {sizes.data(), sizes.size()}, ScalarType::Float);
  const float* time = static_cast<const float*>(flat.const_data_ptr());
  float* row = static_cast<float*>(out.mutable_data_ptr());

  // Rounded to float32 where DiT rounds: networks were trained on these features, and a last bit of a frequency, times
  // t = 999, shows in their outputs.
  const float rate = static_cast<float>(-std::log(max_period));
  const float count = static_cast<float>(static_cast<double>(half) - freq_shift);
  std::vector<float> frequencies(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    const float exponent = rate * static_cast<float>(i) / count;
    frequencies[static_cast<size_t>(i)] = static_cast<float>(std::exp(static_cast<double>(exponent)));
  }
  for (int64_t n = 0; n < times.numel(); ++n, row += dim) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = time[n] * frequencies[static_cast<size_t>(i)];
      row[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
    if (dim % 2 != 0) row[dim - 1] = 0;
  }
  return out;
}

}  // namespace pyard::cpu
