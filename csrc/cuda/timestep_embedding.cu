// Sinusoids of times, cosines first: out[n, i] = cos(t f_i), out[n, half + i] = sin(t f_i),
// f_i = exp(rate * i / count); an odd last column is zero. Rounded to float32 where csrc/cpu/timestep_embedding.cpp and
// DiT round: networks were trained on these features. The functions themselves are taken in double: a float's angle of
// hundreds of radians leaves the fast ones few digits, and there are few times.
#include <launchers.h>

#include <machine.cuh>

namespace pyard::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) embedding_kernel(const TimestepEmbedding arguments) {
  const int dim = arguments.dim, half = dim / 2;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= arguments.count * dim) return;
  const int column = static_cast<int>(place % dim), i = column < half ? column : column - half;
  const float exponent = arguments.rate * static_cast<float>(i) / arguments.frequencies;
  const float frequency = static_cast<float>(exp(static_cast<double>(exponent)));
  const double angle = arguments.times[place / dim] * frequency;  // a product of floats, rounded to one
  const double value = column < half ? cos(angle) : sin(angle);
  arguments.out[place] = column < 2 * half ? static_cast<float>(value) : 0.0f;
}

}  // namespace

extern "C" const char* pyard_cuda_timestep_embedding(const TimestepEmbedding* arguments, void* stream) {
  const int64_t elements = arguments->count * arguments->dim;
  return launch(embedding_kernel, dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads)), kThreads, 0,
                stream, *arguments);
}

}  // namespace pyard::cuda
