// Every kernel at small, ragged sizes, without Python or torch: what benchmarks/gpu runs under compute-sanitizer, and
// python_tests/ops/test_cuda_sanitized.py, on the emulated machine, under ThreadSanitizer and AddressSanitizer.
#include <launchers.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <machine.cuh>
#include <random>
#include <vector>

namespace {

using namespace pyard::cuda;

int failures = 0;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

void check(const char* error, const char* what) {
  check(cudaDeviceSynchronize(), what);
  if (error == nullptr) return;
  std::printf("%s: %s\n", what, error);
  ++failures;
}

int bytes_of(int scalar) { return scalar == 0 ? 4 : 2; }

// Device memory, all of it taken; freed when the program ends, since the sanitizers look at what is used, not at leaks.
void* new_memory(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<size_t>(bytes)), "cudaMalloc");
  return memory;
}

// Numbers of either sign and of size 1/8 to 2: a random sign and mantissa around four exponents.
void* new_random(int64_t elements, int scalar) {
  static std::mt19937 generator(0);
  std::vector<char> host(static_cast<size_t>(elements * bytes_of(scalar)));
  for (int64_t i = 0; i < elements; ++i) {
    const uint32_t random = generator(), exponent = random >> 24 & 3;
    const uint32_t bits = scalar == 0   ? (random & 0x807fffff) | (124 + exponent) << 23
                          : scalar == 1 ? (random & 0x807f) | (124 + exponent) << 7
                                        : (random & 0x83ff) | (12 + exponent) << 10;
    std::memcpy(host.data() + i * bytes_of(scalar), &bits, static_cast<size_t>(bytes_of(scalar)));
  }
  void* memory = new_memory(static_cast<int64_t>(host.size()));
  check(cudaMemcpy(memory, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

void attention(int scalar, int head_dim, int mask, bool with_bias, bool deterministic, int T = 17) {
  const int B = 1, H = 2, query_steps = 2, key_steps = 3;
  const int64_t queries = query_steps * T, keys = key_steps * T;
  const auto heads = [&](int64_t rows, bool random) {
    const int64_t elements = B * H * rows * head_dim;
    void* data = random ? new_random(elements, scalar) : new_memory(elements * bytes_of(scalar));
    return Heads{data, H * rows * head_dim, rows * head_dim, head_dim};
  };
  AttentionForward forward{};
  forward.attention = {scalar,
                       B,
                       H,
                       head_dim,
                       {query_steps, key_steps, T, mask, 2},
                       1.0f / std::sqrt(float(head_dim)),
                       with_bias ? static_cast<const float*>(new_random(H, 0)) : nullptr,
                       heads(queries, true),
                       heads(keys, true),
                       heads(keys, true)};
  forward.out = heads(queries, false);
  forward.lse = static_cast<float*>(new_memory(B * H * queries * 4));
  check(pyard_cuda_attention_forward(&forward, nullptr), "attention forward");

  AttentionBackward backward{};
  backward.attention = forward.attention;
  backward.out = forward.out;
  backward.grad = heads(queries, true);
  backward.lse = forward.lse;
  backward.delta = static_cast<float*>(new_memory(B * H * queries * 4));
  backward.deterministic = deterministic;
  backward.dq_sums = static_cast<float*>(new_memory(B * H * queries * head_dim * 4));
  check(cudaMemset(backward.dq_sums, 0, static_cast<size_t>(B * H * queries * head_dim * 4)), "cudaMemset");
  backward.dq = heads(queries, false);
  backward.dk = heads(keys, false);
  backward.dv = heads(keys, false);
  if (with_bias) {
    backward.dbias = static_cast<float*>(new_memory(B * H * pyard_cuda_attention_key_tiles(key_steps, T) * 4));
  }
  check(pyard_cuda_attention_backward(&backward, nullptr), "attention backward");
}

// `narrow`: 0, or the Scalar of all but the stream.
void residual_norm(int scalar, int dim, bool has_gate, bool has_norm, int narrow = 0) {
  const int B = 1, S = 2, T = dim < 2048 ? 37 : 5, other = narrow == 0 ? scalar : narrow;
  const auto tokens = [&](int kind, bool random) {
    const int64_t elements = static_cast<int64_t>(B) * S * T * dim;
    void* data = random ? new_random(elements, kind) : new_memory(elements * bytes_of(kind));
    return Tokens{data, static_cast<int64_t>(S) * T * dim, static_cast<int64_t>(T) * dim, dim};
  };
  const auto per_step = [&] { return PerStep{new_random(B * S * dim, other), S * dim, dim}; };
  const ResidualNormSizes sizes = {scalar, B, S, T, dim, 1e-6f, has_gate, has_norm, narrow};
  ResidualNormForward forward{sizes,      tokens(scalar, true), tokens(other, true),   per_step(),
                              per_step(), per_step(),           tokens(scalar, false), tokens(other, false)};
  check(pyard_cuda_residual_norm_forward(&forward, nullptr), "residual norm forward");

  ResidualNormBackward backward{};
  backward.sizes = sizes;
  backward.grad_residual = tokens(scalar, true);
  backward.grad_normal = tokens(other, true);
  backward.residual = forward.x;
  backward.branch = forward.branch;
  backward.gate = forward.gate;
  backward.scale = forward.scale;
  backward.dx = tokens(scalar, false);
  backward.dbranch = tokens(other, false);
  backward.partial = static_cast<float*>(new_memory(int64_t{B} * S * pyard_cuda_residual_norm_parts(T) * 3 * dim * 4));
  backward.dgate = new_memory(B * S * dim * 4);
  backward.dshift = new_memory(B * S * dim * 4);
  backward.dscale = new_memory(B * S * dim * 4);
  check(pyard_cuda_residual_norm_backward(&backward, nullptr), "residual norm backward");
}

void gelu(int scalar, int dim) {
  const int rows = 67, parts = pyard_cuda_gelu_parts(rows);
  const int64_t elements = static_cast<int64_t>(rows) * dim;
  Gelu arguments{};
  arguments.scalar = scalar;
  arguments.dim = dim;
  arguments.rows = rows;
  arguments.x = new_random(elements, scalar);
  arguments.bias = new_random(dim, scalar);
  arguments.out = new_memory(elements * bytes_of(scalar));
  check(pyard_cuda_gelu_forward(&arguments, nullptr), "gelu forward");
  arguments.grad = new_random(elements, scalar);
  arguments.parts = parts;
  arguments.partial = static_cast<float*>(new_memory(int64_t{parts} * dim * 4));
  arguments.dbias = new_memory(int64_t{dim} * bytes_of(scalar));
  check(pyard_cuda_gelu_backward(&arguments, nullptr), "gelu backward");
}

void gather(int from, int to) {
  const int64_t index[] = {4, 0, 2};
  void* indices = new_memory(sizeof index);
  check(cudaMemcpy(indices, index, sizeof index, cudaMemcpyHostToDevice), "cudaMemcpy");
  const int64_t steps = 3, row = 72, bytes = 3 * steps * row * 4;
  GatherRows arguments{from,
                       to,
                       new_random(5 * steps * row, from),
                       static_cast<const int64_t*>(indices),
                       new_memory(bytes),
                       new_memory(bytes),
                       3,
                       5,
                       steps,
                       row,
                       steps,
                       1};
  check(pyard_cuda_gather_rows(&arguments, nullptr), "gather");
}

}  // namespace

// `few` leaves out what differs from the rest by a template argument alone, for machines that are slow.
int main(int count, char** words) {
  const bool few = count > 1 && std::strcmp(words[1], "few") == 0;
  for (int scalar = 0; scalar < (few ? 2 : 3); ++scalar) {
    for (int head_dim : {64, 72, 96, 128}) {
      if (few && head_dim != 72) continue;
      attention(scalar, head_dim, kCausal, true, false);
      attention(scalar, head_dim, kCausal, false, true);
    }
    for (int mask = 0; mask < 4 && !few; ++mask) attention(scalar, 72, mask, true, mask % 2 == 0);
    // Enough tiles for every stage of the pipeline to be filled again.
    for (const bool deterministic : {false, true}) {
      if (!few || scalar == 1) attention(scalar, 72, kCausal, false, deterministic, 70);
    }
    for (int dim : {72, 1152, 2048, 8192}) {
      residual_norm(scalar, dim, true, false);
      residual_norm(scalar, dim, false, true);
      residual_norm(scalar, dim, true, true);
    }
    for (int dim : {72, 1160}) gelu(scalar, dim);
    for (int to = 0; to < 3; ++to) gather(scalar, to);
  }
  for (int narrow = 1; narrow < (few ? 2 : 3); ++narrow) {
    for (int dim : {72, 1152, 2048, 8192}) {
      residual_norm(0, dim, true, false, narrow);
      residual_norm(0, dim, false, true, narrow);
      residual_norm(0, dim, true, true, narrow);
    }
  }
  const float times[] = {0.0f, 1.0f, 999.0f};
  void* on_device = new_memory(sizeof times);
  check(cudaMemcpy(on_device, times, sizeof times, cudaMemcpyHostToDevice), "cudaMemcpy");
  TimestepEmbedding embedding{static_cast<const float*>(on_device),
                              static_cast<float*>(new_memory(3 * 257 * 4)),
                              3,
                              257,
                              -std::log(10000.0f),
                              128.0f};
  check(pyard_cuda_timestep_embedding(&embedding, nullptr), "timestep embedding");
  std::printf("%s\n", failures == 0 ? "every kernel ran" : "kernels were refused");
  return failures == 0 ? 0 : 1;
}
