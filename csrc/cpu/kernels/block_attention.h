// Attention between blocks of T tokens, tiled so that logits never leave the second-level cache. Pointers lead to the
// storage type of the chosen kernel unless it is said otherwise; strides count elements from token to token; the head
// dimension is contiguous everywhere.
#pragma once

#include <cstdint>

#include "block_mask.h"
#include "storage.h"

namespace pyard::cpu {

struct Tokens {
  const void* data;  // [tokens, Dh]
  int64_t stride;
};

struct MutableTokens {
  void* data;  // [tokens, Dh]
  int64_t stride;
};

struct KeyRange {
  int64_t begin;
  int64_t end;
  double bias;  // added to the logits
};

// Some queries of one step of one head. A KeyRange may be empty.
struct BlockAttentionQueries {
  Tokens q;           // [queries, Dh]
  Tokens k;           // [Sk * T, Dh]
  Tokens v;           // [Sk * T, Dh]
  MutableTokens out;  // [queries, Dh]
  void* log_sum_exp;  // [queries], accumulator type
  int64_t queries;    // at most kQueriesPerTask
  int64_t head_dim;
  double scale;        // of the logits
  KeyRange ranges[2];  // the keys that these queries see
  void* workspace;     // aligned to 64 bytes
};

// One head of one sample, all steps.
struct BlockAttentionHead {
  Tokens grad;              // [Sq * T, Dh]
  Tokens q;                 // [Sq * T, Dh]
  Tokens k;                 // [Sk * T, Dh]
  Tokens v;                 // [Sk * T, Dh]
  Tokens out;               // [Sq * T, Dh]
  const void* log_sum_exp;  // [Sq * T], accumulator type
  MutableTokens dq;         // [Sq * T, Dh]
  MutableTokens dk;         // [Sk * T, Dh]
  MutableTokens dv;         // [Sk * T, Dh]
  void* dbias;              // scalar, accumulator type; null: not wanted
  BlockMask mask;
  int64_t tokens_per_step;
  int64_t head_dim;
  double scale;  // of the logits
  double bias;   // added to the logits of earlier steps' keys
  void* workspace;
};

constexpr int64_t kQueriesPerTask = 128;

struct BlockAttentionKernel {
  void (*run)(const BlockAttentionQueries&);
  int64_t (*workspace_bytes)(int64_t head_dim);
};

struct BlockAttentionBackwardKernel {
  void (*run)(const BlockAttentionHead&);
  int64_t (*workspace_bytes)(int64_t query_steps, int64_t tokens_per_step, int64_t head_dim);
};

#define PYARD_DECLARE_KERNELS(isa)                                        \
  namespace isa {                                                         \
  BlockAttentionKernel block_attention(Storage storage);                  \
  BlockAttentionBackwardKernel block_attention_backward(Storage storage); \
  }
PYARD_DECLARE_KERNELS(baseline)
PYARD_DECLARE_KERNELS(avx2)
PYARD_DECLARE_KERNELS(avx512)
#undef PYARD_DECLARE_KERNELS

}  // namespace pyard::cpu
