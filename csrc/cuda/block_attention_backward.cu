// Attention between blocks of tokens, backward, after Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2. With
// P = softmax(logits), dP = grad v^T and delta = rowsum(out * grad):
//   dlogits = P * (dP - delta), dv = P^T grad, dk = dlogits^T q * scale, dq = dlogits k * scale, dbias = sum of
//   dlogits.
// One kernel owns 64 keys and streams the queries that see them; it works on transposed tiles, so that P and dlogits go
// from accumulators to operands without leaving their lanes. dq is either summed there by atomics, in any order, or by
// a kernel of its own that owns queries and computes the logits again: two products of seven more, and the same bits
// always.
#include <block_attention.cuh>
#include <rows.cuh>

namespace pyard::cuda {
namespace {

template <typename T, int kHeadDim, bool kSumsQueries>
struct KeyLayout {
  static constexpr int kQueries = kStreamedRowsBackward<T, kHeadDim>;
  static constexpr int kKeyElements = kOwnedRows * kStride<kHeadDim>;
  static constexpr int kQueryElements = kQueries * kStride<kHeadDim>;
  static constexpr int kLogitStride = kQueries + 8;
  static constexpr int kLogitElements = kSumsQueries ? kOwnedRows * kLogitStride : 0;
  // Keys, values, two stages of queries and grad, dlogits; then two stages of lse and delta.
  static constexpr int kElements = 2 * kKeyElements + 4 * kQueryElements + kLogitElements;
  static constexpr int kSharedBytes = kElements * static_cast<int>(sizeof(T)) + 4 * kQueries * 4;
};

// dq [queries, kHeadDim] += dlogits^T [queries, keys] k [keys, kHeadDim], by atomics.
template <typename T, int kHeadDim, int kQueries>
__device__ __forceinline__ void sum_into_queries(const T* logit_grads,  // [kOwnedRows, kQueries + 8]
                                                 const T* k_tile, float* dq, int head_dim, int queries, float scale) {
  constexpr int kRowWarps = kQueries / 16, kColumnWarps = kWarps / kRowWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp % kRowWarps * 16;
  FragmentA<T> left[kOwnedRows / 16];
#pragma unroll
  for (int inner = 0; inner < kOwnedRows / 16; ++inner) {
    load_transposed(left[inner], logit_grads + inner * 16 * (kQueries + 8) + row, kQueries + 8);
  }
  for (int n = warp / kRowWarps * 16; n < kHeadDim; n += kColumnWarps * 16) {
    float sums[2][4] = {};
#pragma unroll
    for (int inner = 0; inner < kOwnedRows / 16; ++inner) {
      FragmentB<T> right0, right1;
      load_transposed(right0, right1, k_tile + inner * 16 * kStride<kHeadDim> + n, kStride<kHeadDim>);
      multiply_add(sums[0], left[inner], right0);
      multiply_add(sums[1], left[inner], right1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = row + lane_row() + i % 2 * 8, column = n + i / 2 * 8 + lane_column();
      if (query < queries && column < head_dim) {
        add_atomically(dq + static_cast<int64_t>(query) * head_dim + column, sums[i / 2][i % 2 * 2] * scale,
                       sums[i / 2][i % 2 * 2 + 1] * scale);
      }
    }
  }
}

template <typename T, int kHeadDim, bool kSumsQueries>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) key_kernel(const AttentionBackward arguments) {
  using Layout = KeyLayout<T, kHeadDim, kSumsQueries>;
  constexpr int kQueries = Layout::kQueries;
  const Attention& attention = arguments.attention;
  const BlockMask& mask = attention.mask;
  const int b = static_cast<int>(blockIdx.z), h = static_cast<int>(blockIdx.y);
  // The first steps are seen by most queries: they go first.
  const int task = static_cast<int>(blockIdx.x);
  const int tiles_per_step = divide_up(mask.tokens, kOwnedRows);
  const int in_step = task % tiles_per_step * kOwnedRows, first = task / tiles_per_step * mask.tokens + in_step;
  const int keys = smaller(kOwnedRows, mask.tokens - in_step);
  Seen seen = seeing_queries(mask, task / tiles_per_step);
  if (attention.bias == nullptr) seen = joined(seen);
  const int tiles = tile_count(seen, kQueries);

  T* k_tile = reinterpret_cast<T*>(dynamic_shared());  // [kOwnedRows, kStride]
  T* v_tile = k_tile + Layout::kKeyElements;           // [kOwnedRows, kStride]
  T* stages = v_tile + Layout::kKeyElements;           // 2 x (q, grad), each [kQueries, kStride]
  T* logit_grads = stages + 4 * Layout::kQueryElements;
  float* statistics = reinterpret_cast<float*>(logit_grads + Layout::kLogitElements);  // 2 x (lse, delta) [kQueries]
  const T* q = head_of<const T>(attention.q, b, h);
  const T* grad = head_of<const T>(arguments.grad, b, h);
  const int64_t head = static_cast<int64_t>(b) * attention.heads + h;
  const int64_t rows_of_head = static_cast<int64_t>(mask.query_steps) * mask.tokens;
  const float* lse = arguments.lse + head * rows_of_head;
  const float* delta = arguments.delta + head * rows_of_head;
  const auto load_stage = [&](int index) {
    const Tile tile = tile_at(seen, kQueries, index);
    T* stage = stages + index % 2 * 2 * Layout::kQueryElements;
    load_tile<T, kQueries, kHeadDim>(stage, q + tile.begin * attention.q.row, attention.q.row, tile.rows,
                                     attention.head_dim);
    load_tile<T, kQueries, kHeadDim>(stage + Layout::kQueryElements, grad + tile.begin * arguments.grad.row,
                                     arguments.grad.row, tile.rows, attention.head_dim);
    copy_async_commit();
    float* place = statistics + index % 2 * 2 * kQueries;
    for (int i = static_cast<int>(threadIdx.x); i < kQueries; i += kThreads) {
      place[i] = i < tile.rows ? lse[tile.begin + i] * kLog2E : INFINITY;  // infinity: such a query sees nothing
      place[kQueries + i] = i < tile.rows ? delta[tile.begin + i] : 0.0f;
    }
  };
  load_tile<T, kOwnedRows, kHeadDim>(k_tile, head_of<const T>(attention.k, b, h) + first * attention.k.row,
                                     attention.k.row, keys, attention.head_dim);
  load_tile<T, kOwnedRows, kHeadDim>(v_tile, head_of<const T>(attention.v, b, h) + first * attention.v.row,
                                     attention.v.row, keys, attention.head_dim);
  copy_async_commit();
  if (tiles > 0) load_stage(0);

  const int row = static_cast<int>(threadIdx.x) / 32 * 16;  // of this warp among the tile's keys
  T* own_k = k_tile + row * kStride<kHeadDim>;
  T* own_v = v_tile + row * kStride<kHeadDim>;
  const float scale = attention.scale * kLog2E;
  const float bias = attention.bias == nullptr ? 0.0f : attention.bias[h] * kLog2E;
  float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
  }
  float dbias = 0.0f;

  for (int index = 0; index < tiles; ++index) {
    copy_async_wait();
    __syncthreads();  // this stage has landed for all, and all are done with the other one
    if (index + 1 < tiles) load_stage(index + 1);
    const Tile tile = tile_at(seen, kQueries, index);
    const T* q_tile = stages + index % 2 * 2 * Layout::kQueryElements;
    const T* grad_tile = q_tile + Layout::kQueryElements;
    const float* lse_tile = statistics + index % 2 * 2 * kQueries;

    float weights[kQueries / 8][4], logits[kQueries / 8][4];  // [keys, queries]
    multiply_rows<T, kHeadDim, kQueries>(weights, own_k, q_tile);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = row + lane_row() + i / 2 * 8 < keys;
        const float logit = weights[n][i] * scale + (tile.other ? bias : 0.0f);
        const float weight = exp2_approximate(logit - lse_tile[8 * n + lane_column() + i % 2]);
        weights[n][i] = inside ? weight : 0.0f;
      }
    }
    multiply_rows<T, kHeadDim, kQueries>(logits, own_v, grad_tile);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[n][i] = weights[n][i] * (logits[n][i] - lse_tile[kQueries + 8 * n + lane_column() + i % 2]);
        if (tile.other) dbias += logits[n][i];
      }
    }
    if constexpr (kSumsQueries) {
      T* place = logit_grads + (row + lane_row()) * Layout::kLogitStride + lane_column();
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        store_pair(place + 8 * n, logits[n][0], logits[n][1]);
        store_pair(place + 8 * n + 8 * Layout::kLogitStride, logits[n][2], logits[n][3]);
      }
    }
    accumulate<T, kHeadDim, kQueries>(dv, weights, grad_tile);
    accumulate<T, kHeadDim, kQueries>(dk, logits, q_tile);
    if constexpr (kSumsQueries) {
      __syncthreads();  // every warp's dlogits are there
      float* dq = arguments.dq_sums + (head * rows_of_head + tile.begin) * attention.head_dim;
      sum_into_queries<T, kHeadDim, kQueries>(logit_grads, k_tile, dq, attention.head_dim, tile.rows, attention.scale);
    }
  }
  copy_async_wait();
  __syncthreads();  // the keys' place becomes the stage of dk and dv, and other warps read all keys for dq

  store_rows<T, kHeadDim>(own_k, dk, attention.scale, attention.scale,
                          head_of<T>(arguments.dk, b, h) + (first + row) * arguments.dk.row, arguments.dk.row,
                          keys - row, attention.head_dim);
  store_rows<T, kHeadDim>(own_v, dv, 1.0f, 1.0f, head_of<T>(arguments.dv, b, h) + (first + row) * arguments.dv.row,
                          arguments.dv.row, keys - row, attention.head_dim);
  if (arguments.dbias != nullptr) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) dbias += __shfl_xor_sync(0xffffffffu, dbias, distance);
    if (lane_index() == 0) statistics[row / 16] = dbias;  // read for the last time before the barrier above
    __syncthreads();
    if (threadIdx.x == 0) {
      arguments.dbias[head * gridDim.x + task] = statistics[0] + statistics[1] + statistics[2] + statistics[3];
    }
  }
}

template <typename T, int kHeadDim>
struct QueryLayout {
  static constexpr int kKeys = kStreamedRowsBackward<T, kHeadDim>;
  static constexpr int kQueryElements = kOwnedRows * kStride<kHeadDim>;
  static constexpr int kKeyElements = kKeys * kStride<kHeadDim>;
  // q and grad, then two stages of keys and values.
  static constexpr int kSharedBytes = (2 * kQueryElements + 4 * kKeyElements) * static_cast<int>(sizeof(T));
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) query_kernel(const AttentionBackward arguments) {
  using Layout = QueryLayout<T, kHeadDim>;
  constexpr int kKeys = Layout::kKeys;
  const Attention& attention = arguments.attention;
  const BlockMask& mask = attention.mask;
  const int b = static_cast<int>(blockIdx.z), h = static_cast<int>(blockIdx.y);
  const int task = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int tiles_per_step = divide_up(mask.tokens, kOwnedRows);
  const int query_step = task / tiles_per_step, in_step = task % tiles_per_step * kOwnedRows;
  const int first = query_step * mask.tokens + in_step, queries = smaller(kOwnedRows, mask.tokens - in_step);
  const Seen seen = seen_keys(attention, mask.key_steps - mask.query_steps + query_step);
  const int tiles = tile_count(seen, kKeys);

  T* q_tile = reinterpret_cast<T*>(dynamic_shared());  // [kOwnedRows, kStride]
  T* grad_tile = q_tile + Layout::kQueryElements;      // [kOwnedRows, kStride]
  T* stages = grad_tile + Layout::kQueryElements;      // 2 x (keys, values), each [kKeys, kStride]
  const T* k = head_of<const T>(attention.k, b, h);
  const T* v = head_of<const T>(attention.v, b, h);
  const auto load_stage = [&](int index) {
    const Tile tile = tile_at(seen, kKeys, index);
    T* stage = stages + index % 2 * 2 * Layout::kKeyElements;
    load_tile<T, kKeys, kHeadDim>(stage, k + tile.begin * attention.k.row, attention.k.row, tile.rows,
                                  attention.head_dim);
    load_tile<T, kKeys, kHeadDim>(stage + Layout::kKeyElements, v + tile.begin * attention.v.row, attention.v.row,
                                  tile.rows, attention.head_dim);
    copy_async_commit();
  };
  load_tile<T, kOwnedRows, kHeadDim>(q_tile, head_of<const T>(attention.q, b, h) + first * attention.q.row,
                                     attention.q.row, queries, attention.head_dim);
  load_tile<T, kOwnedRows, kHeadDim>(grad_tile, head_of<const T>(arguments.grad, b, h) + first * arguments.grad.row,
                                     arguments.grad.row, queries, attention.head_dim);
  load_stage(0);

  const int row = static_cast<int>(threadIdx.x) / 32 * 16;
  T* own_q = q_tile + row * kStride<kHeadDim>;
  const T* own_grad = grad_tile + row * kStride<kHeadDim>;
  const float scale = attention.scale * kLog2E;
  const float bias = attention.bias == nullptr ? 0.0f : attention.bias[h] * kLog2E;
  const int64_t rows_of_head = static_cast<int64_t>(mask.query_steps) * mask.tokens;
  const int64_t first_row = (static_cast<int64_t>(b) * attention.heads + h) * rows_of_head + first + row;
  float lse[2], delta[2];  // of rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = lane_row() + 8 * half;
    const bool inside = row + own < queries;
    lse[half] = inside ? arguments.lse[first_row + own] * kLog2E : INFINITY;
    delta[half] = inside ? arguments.delta[first_row + own] : 0.0f;
  }
  float dq[kHeadDim / 8][4];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0.0f;

  for (int index = 0; index < tiles; ++index) {
    copy_async_wait();
    __syncthreads();  // this stage has landed for all, and all are done with the other one
    if (index + 1 < tiles) load_stage(index + 1);
    const Tile tile = tile_at(seen, kKeys, index);
    const T* k_tile = stages + index % 2 * 2 * Layout::kKeyElements;

    float weights[kKeys / 8][4], logits[kKeys / 8][4];  // [queries, keys]
    multiply_rows<T, kHeadDim, kKeys>(weights, own_q, k_tile);
    multiply_rows<T, kHeadDim, kKeys>(logits, own_grad, k_tile + Layout::kKeyElements);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = 8 * n + lane_column() + i % 2 < tile.rows;
        const float logit = weights[n][i] * scale + (tile.other ? bias : 0.0f);
        const float weight = inside ? exp2_approximate(logit - lse[i / 2]) : 0.0f;
        logits[n][i] = weight * (logits[n][i] - delta[i / 2]);
      }
    }
    accumulate<T, kHeadDim, kKeys>(dq, logits, k_tile);
  }

  __syncwarp();
  store_rows<T, kHeadDim>(own_q, dq, attention.scale, attention.scale,
                          head_of<T>(arguments.dq, b, h) + (first + row) * arguments.dq.row, arguments.dq.row,
                          queries - row, attention.head_dim);
}

// delta = rowsum(out * grad); eight lanes take a row.
constexpr int kLanesOfRow = 8;
constexpr int kRowsOfDelta = kThreads / kLanesOfRow;

template <typename T>
__global__ void __launch_bounds__(kThreads) delta_kernel(const AttentionBackward arguments) {
  const Attention& attention = arguments.attention;
  const int rows_of_head = attention.mask.query_steps * attention.mask.tokens;
  const int b = static_cast<int>(blockIdx.z), h = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * kRowsOfDelta + static_cast<int>(threadIdx.x) / kLanesOfRow;
  const int lane = lane_index() % kLanesOfRow;
  float sum = 0.0f;
  if (row < rows_of_head) {
    const T* out = head_of<const T>(arguments.out, b, h) + row * arguments.out.row;
    const T* grad = head_of<const T>(arguments.grad, b, h) + row * arguments.grad.row;
    for (int column = lane * kPerChunk<T>; column < attention.head_dim; column += kLanesOfRow * kPerChunk<T>) {
      float left[kPerChunk<T>], right[kPerChunk<T>];
      unpack(left, load_chunk(out, column, attention.head_dim), T{});
      unpack(right, load_chunk(grad, column, attention.head_dim), T{});
#pragma unroll
      for (int i = 0; i < kPerChunk<T>; ++i) sum += left[i] * right[i];
    }
  }
#pragma unroll
  for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  const int64_t head = static_cast<int64_t>(b) * attention.heads + h;
  if (row < rows_of_head && lane == 0) arguments.delta[head * rows_of_head + row] = sum;
}

struct Backward {
  const AttentionBackward& arguments;
  void* stream;

  template <typename T, int kHeadDim>
  const char* start() const {
    const Attention& attention = arguments.attention;
    const BlockMask& mask = attention.mask;
    const unsigned heads = attention.heads, batch = attention.batch;
    const dim3 rows(divide_up(mask.query_steps * mask.tokens, kRowsOfDelta), heads, batch);
    const dim3 keys(tiles_of_steps(mask.key_steps, mask.tokens, kOwnedRows), heads, batch);
    const dim3 queries(tiles_of_steps(mask.query_steps, mask.tokens, kOwnedRows), heads, batch);
    const char* error = launch(delta_kernel<T>, rows, kThreads, 0, stream, arguments);
    if (error != nullptr) return error;
    if (arguments.deterministic == 0) {
      return launch(key_kernel<T, kHeadDim, true>, keys, kThreads, KeyLayout<T, kHeadDim, true>::kSharedBytes, stream,
                    arguments);
    }
    error = launch(key_kernel<T, kHeadDim, false>, keys, kThreads, KeyLayout<T, kHeadDim, false>::kSharedBytes, stream,
                   arguments);
    if (error != nullptr) return error;
    return launch(query_kernel<T, kHeadDim>, queries, kThreads, QueryLayout<T, kHeadDim>::kSharedBytes, stream,
                  arguments);
  }
};

}  // namespace

extern "C" int pyard_cuda_attention_key_tiles(int key_steps, int tokens) {
  return tiles_of_steps(key_steps, tokens, kOwnedRows);
}

extern "C" const char* pyard_cuda_attention_backward(const AttentionBackward* arguments, void* stream) {
  return with_attention(arguments->attention, Backward{*arguments, stream});
}

}  // namespace pyard::cuda
