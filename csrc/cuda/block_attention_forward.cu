// Attention between blocks of tokens, forward: the tiled online softmax of Dao, "FlashAttention-2" (arXiv 2307.08691),
// algorithm 1, over the tiles that the block mask lets a query tile see. One block of threads owns 64 queries of one
// step.
#include <block_attention.cuh>

namespace pyard::cuda {
namespace {

template <typename T, int kHeadDim>
struct ForwardLayout {
  static constexpr int kKeys = kStreamedRows<T, kHeadDim>;
  static constexpr int kQueryElements = kOwnedRows * kStride<kHeadDim>;
  static constexpr int kKeyElements = kKeys * kStride<kHeadDim>;
  // Queries, then two stages of keys and values.
  static constexpr int kSharedBytes = (kQueryElements + 4 * kKeyElements) * static_cast<int>(sizeof(T));
};

// Blocks that share a multiprocessor: what the registers are rationed for.
template <typename T>
inline constexpr int kResident = sizeof(T) == 4 ? 2 : 3;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kResident<T>) forward_kernel(const AttentionForward arguments) {
  using Layout = ForwardLayout<T, kHeadDim>;
  constexpr int kKeys = Layout::kKeys;
  const Attention& attention = arguments.attention;
  const BlockMask& mask = attention.mask;
  const int b = static_cast<int>(blockIdx.z), h = static_cast<int>(blockIdx.y);
  // The last steps see most keys: they go first, so that the shortest work fills the end.
  const int task = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int tiles_per_step = divide_up(mask.tokens, kOwnedRows);
  const int query_step = task / tiles_per_step, in_step = task % tiles_per_step * kOwnedRows;
  const int first = query_step * mask.tokens + in_step, queries = smaller(kOwnedRows, mask.tokens - in_step);
  const Seen seen = seen_keys(attention, mask.key_steps - mask.query_steps + query_step);
  const int tiles = tile_count(seen, kKeys);

  T* q_tile = reinterpret_cast<T*>(dynamic_shared());  // [kOwnedRows, kStride]
  T* stages = q_tile + Layout::kQueryElements;         // 2 x (keys, values), each [kKeys, kStride]
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
  load_stage(0);

  const int warp = static_cast<int>(threadIdx.x) / 32;
  T* own_rows = q_tile + warp * 16 * kStride<kHeadDim>;
  const float scale = attention.scale * kLog2E;
  const float bias = attention.bias == nullptr ? 0.0f : attention.bias[h] * kLog2E;
  float out[kHeadDim / 8][4];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  // Of rows g and g + 8 of this warp's 16, in base 2. From a finite start: under a bias of -inf the first tiles are all
  // -inf, and -inf - -inf is NaN. The CPU's kernel starts at the same number.
  float highest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};

  for (int index = 0; index < tiles; ++index) {
    copy_async_wait();
    __syncthreads();  // this stage has landed for all, and all are done with the other one
    if (index + 1 < tiles) load_stage(index + 1);
    const Tile tile = tile_at(seen, kKeys, index);
    const T* k_tile = stages + index % 2 * 2 * Layout::kKeyElements;

    float logits[kKeys / 8][4];
    multiply_rows<T, kHeadDim, kKeys>(logits, own_rows, k_tile);
    float now[2] = {highest[0], highest[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = 8 * n + lane_column() + i % 2 < tile.rows;
        logits[n][i] = inside ? logits[n][i] * scale + (tile.other ? bias : 0.0f) : -INFINITY;
        now[i / 2] = fmaxf(now[i / 2], logits[n][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      now[half] = row_max(now[half]);
      const float shrink = exp2_approximate(highest[half] - now[half]);
      highest[half] = now[half];
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[n][i] = exp2_approximate(logits[n][i] - highest[i / 2]);
        sum[i / 2] += logits[n][i];
      }
    }
    accumulate<T, kHeadDim, kKeys>(out, logits, k_tile + Layout::kKeyElements);
  }

  const int row = warp * 16;
  const int64_t rows_of_head = static_cast<int64_t>(mask.query_steps) * mask.tokens;
  float* lse = arguments.lse + (static_cast<int64_t>(b) * attention.heads + h) * rows_of_head + first + row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = row_sum(sum[half]);
    const int own = lane_row() + 8 * half;
    if (lane_column() == 0 && row + own < queries) lse[own] = highest[half] * kLn2 + logf(sum[half]);
  }
  __syncwarp();
  // Only this warp reads its queries, so their place can stage its results.
  store_rows<T, kHeadDim>(own_rows, out, 1.0f / sum[0], 1.0f / sum[1],
                          head_of<T>(arguments.out, b, h) + (first + row) * arguments.out.row, arguments.out.row,
                          queries - row, attention.head_dim);
}

struct Forward {
  const AttentionForward& arguments;
  void* stream;

  template <typename T, int kHeadDim>
  const char* start() const {
    const Attention& attention = arguments.attention;
    const BlockMask& mask = attention.mask;
    const dim3 grid(tiles_of_steps(mask.query_steps, mask.tokens, kOwnedRows), attention.heads, attention.batch);
    return launch(forward_kernel<T, kHeadDim>, grid, kThreads, ForwardLayout<T, kHeadDim>::kSharedBytes, stream,
                  arguments);
  }
};

}  // namespace

extern "C" const char* pyard_cuda_attention_forward(const AttentionForward* arguments, void* stream) {
  return with_attention(arguments->attention, Forward{*arguments, stream});
}

}  // namespace pyard::cuda
