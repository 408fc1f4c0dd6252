#include "convert.h"

#include "vec.h"

namespace pyard::cpu {
namespace {

template <typename From, typename To>
void convert_all(const void* in, void* out, int64_t count) {
  const From* from = static_cast<const From*>(in);
  To* to = static_cast<To*>(out);
  for_each_vector<float>(count, [&](int64_t i, auto part) { store(to + i, load(from + i, part), part); });
}

template <typename From>
ConvertKernel convert_to(Storage to) {
  switch (to) {
    case Storage::bfloat16:
      return convert_all<From, BFloat16>;
    case Storage::float16:
      return convert_all<From, Float16>;
    case Storage::float32:
      return convert_all<From, float>;
    default:
      return nullptr;
  }
}

}  // namespace

namespace PYARD_ISA {

ConvertKernel convert(Storage from, Storage to) {
  switch (from) {
    case Storage::bfloat16:
      return convert_to<BFloat16>(to);
    case Storage::float16:
      return convert_to<Float16>(to);
    case Storage::float32:
      return convert_to<float>(to);
    default:
      return nullptr;
  }
}

}  // namespace PYARD_ISA
}  // namespace pyard::cpu
