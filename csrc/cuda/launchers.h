// The kernels' C interface: raw device pointers, sizes, strides in elements, a stream. Nothing of torch, nothing of
// CUDA's headers. Every launcher returns null, or what CUDA says went wrong. B batch, S num_steps, T tokens_per_step, D
// hidden size, H heads, Dh head size, Sq and Sk blocks of queries and keys.
#pragma once

#include <cstdint>

#include "tiling.h"

namespace pyard::cuda {

// A [B, S, T, D] tensor; rows of D are contiguous and start at multiples of 16 bytes.
struct Tokens {
  void* data;
  int64_t batch, step, token;  // strides
};

// A [B, S, D] tensor; likewise.
struct PerStep {
  void* data;
  int64_t batch, step;
};

// A [B, H, rows, Dh] tensor; likewise.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

struct ResidualNormSizes {
  int scalar;  // Scalar
  int batch, steps, tokens, dim;
  float eps;
  int has_gate, has_norm;  // gated_residual, modulated_layer_norm, or both in one pass
  // 0: all tensors are of `scalar`. Else the Scalar, of 16 bits, of all but x, residual and their gradients, which are
  // float32: what autocast makes of a float32 network.
  int narrow;
};

// residual = x + gate * branch; normal = LayerNorm(residual) * (1 + scale) + shift.
struct ResidualNormForward {
  ResidualNormSizes sizes;
  Tokens x, branch;
  PerStep gate, shift, scale;
  Tokens residual, normal;  // out
};

struct ResidualNormBackward {
  ResidualNormSizes sizes;
  Tokens grad_residual, grad_normal;
  Tokens residual, branch;  // residual: the input of the norm (x itself where there is no gate)
  PerStep gate, scale;
  Tokens dx, dbranch;             // out; dx is written only with a norm: it is grad_residual without one
  float* partial;                 // [B * S, parts, sums, D] scratch, see residual_norm_parts
  void *dgate, *dshift, *dscale;  // out [B, S, D], contiguous
};

struct Attention {
  int scalar;  // Scalar
  int batch, heads, head_dim;
  BlockMask mask;
  float scale;        // of the logits
  const float* bias;  // [H], added to the logits of earlier blocks' keys; null: none
  Heads q, k, v;      // [B, H, Sq * T, Dh], [B, H, Sk * T, Dh] twice
};

struct AttentionForward {
  Attention attention;
  Heads out;   // [B, H, Sq * T, Dh]
  float* lse;  // out [B, H, Sq * T]: log-sum-exp of the logits
};

struct AttentionBackward {
  Attention attention;
  Heads out, grad;   // [B, H, Sq * T, Dh]
  const float* lse;  // [B, H, Sq * T]
  float* delta;      // [B, H, Sq * T] scratch: rows' sums of out * grad
  int deterministic;
  float* dq_sums;    // [B, H, Sq * T, Dh] zeros, summed into where not deterministic
  Heads dq, dk, dv;  // out; dq is written only where deterministic
  float* dbias;      // out [B, H, key tiles]: summed over B and tiles it is bias's gradient; null: not wanted
};

// x + bias through the tanh form of GELU, or its backward; rows of dim are contiguous and start at multiples of 16
// bytes.
struct Gelu {
  int scalar;  // Scalar
  int dim;
  int64_t rows;
  const void* grad;  // [rows, dim], in backward
  const void* x;     // [rows, dim]
  const void* bias;  // [dim]
  void* out;         // out [rows, dim], or dx
  int parts;         // in backward: pyard_cuda_gelu_parts(rows)
  float* partial;    // [parts, dim] scratch
  void* dbias;       // out [dim]
};

struct TimestepEmbedding {
  const float* times;  // [count]
  float* out;          // [count, dim]
  int64_t count;
  int dim;
  float rate, frequencies;  // -log(max_period), dim // 2 - freq_shift
};

// Chosen trajectories of a store that lies on the device, converted on the way. `store` holds `steps` rows of each; row
// s becomes row s of the sample's target and, where there is one, row s + history_offset of its history.
struct GatherRows {
  int from, to;          // Scalar
  const void* store;     // [rows, steps, row]
  const int64_t* index;  // [count]
  void* target;          // out [count, steps, row], or null
  void* history;         // out [count, history_steps, row]
  int64_t count, rows, steps, row, history_steps, history_offset;
};

extern "C" {
int pyard_cuda_residual_norm_parts(int tokens);
const char* pyard_cuda_residual_norm_forward(const ResidualNormForward* arguments, void* stream);
const char* pyard_cuda_residual_norm_backward(const ResidualNormBackward* arguments, void* stream);
int pyard_cuda_gelu_parts(int64_t rows);
const char* pyard_cuda_gelu_forward(const Gelu* arguments, void* stream);
const char* pyard_cuda_gelu_backward(const Gelu* arguments, void* stream);
int pyard_cuda_attention_key_tiles(int key_steps, int tokens);
const char* pyard_cuda_attention_forward(const AttentionForward* arguments, void* stream);
const char* pyard_cuda_attention_backward(const AttentionBackward* arguments, void* stream);
const char* pyard_cuda_timestep_embedding(const TimestepEmbedding* arguments, void* stream);
const char* pyard_cuda_gather_rows(const GatherRows* arguments, void* stream);
}

}  // namespace pyard::cuda
