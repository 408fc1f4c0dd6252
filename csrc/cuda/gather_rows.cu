// gather_trajectories: every row of the chosen trajectories is read once, converted, and written to the target and, one
// step later, to the history.
#include <rows.cuh>

namespace pyard::cuda {
namespace {

constexpr int kThreads = 256;

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherRows arguments) {
  const int64_t sample = blockIdx.z, s = blockIdx.y;
  const int64_t index = arguments.index[sample];
  // A wrong index must neither read beyond the store nor pass unseen.
  const bool inside = index >= 0 && index < arguments.rows;
  const From* from =
      static_cast<const From*>(arguments.store) + ((inside ? index : 0) * arguments.steps + s) * arguments.row;
  const int64_t slot = s + arguments.history_offset;
  To* target = static_cast<To*>(arguments.target) + (sample * arguments.steps + s) * arguments.row;
  To* history = static_cast<To*>(arguments.history) + (sample * arguments.history_steps + slot) * arguments.row;
  // As many elements as make 16 bytes of the narrower of the two types.
  constexpr int kElements = sizeof(From) < sizeof(To) ? kPerChunk<From> : kPerChunk<To>;
  constexpr int kReads = kElements / kPerChunk<From>, kWrites = kElements / kPerChunk<To>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (column >= arguments.row) return;
  float values[kElements];
#pragma unroll
  for (int i = 0; i < kReads; ++i) {
    float read[kPerChunk<From>];
    unpack(read, read_chunk(from + column + i * kPerChunk<From>), From{});
#pragma unroll
    for (int j = 0; j < kPerChunk<From>; ++j) values[i * kPerChunk<From> + j] = inside ? read[j] : NAN;
  }
#pragma unroll
  for (int i = 0; i < kWrites; ++i) {
    float written[kPerChunk<To>];
#pragma unroll
    for (int j = 0; j < kPerChunk<To>; ++j) written[j] = values[i * kPerChunk<To> + j];
    const Chunk chunk = pack_chunk(written, To{});
    const int64_t place = column + i * kPerChunk<To>;
    if (arguments.target != nullptr) write_chunk(target + place, chunk);
    if (slot < arguments.history_steps) write_chunk(history + place, chunk);
  }
}

}  // namespace

extern "C" const char* pyard_cuda_gather_rows(const GatherRows* arguments, void* stream) {
  constexpr int64_t kMost = 65535;
  if (arguments->row % 8 != 0) return "a sample must be a multiple of 8 elements";
  if (arguments->count > kMost || arguments->steps > kMost) return "more than 65535 samples or steps in one call";
  return with_scalar(arguments->from, [&](auto from) {
    return with_scalar(arguments->to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const int64_t threads = arguments->row / (sizeof(From) < sizeof(To) ? kPerChunk<From> : kPerChunk<To>);
      const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                      static_cast<unsigned>(arguments->steps), static_cast<unsigned>(arguments->count));
      return launch(gather_kernel<From, To>, grid, kThreads, 0, stream, *arguments);
    });
  });
}

}  // namespace pyard::cuda
