// Online softmax over tiles of keys (Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 1), transposed: vector
// lanes are queries. Maximum, sum and rescaling are then plain vector operations, the output of one product is the
// operand of the next as it lies, and no head size leaves lanes empty. Compiled once per instruction set.
#include "block_attention.h"
#include "exp2.h"
#include "gemm.h"

namespace pyard::cpu {
namespace {

constexpr int64_t kKeysPerTile = 128;

// Strides of the two left factors: a vector more than the size, since powers of two would meet in one cache set.
template <typename A>
constexpr int64_t kKeyStride = kKeysPerTile + kLanes<A>;
template <typename A>
int64_t value_stride(int64_t head_dim) {
  return round_up(head_dim, kLanes<A>) + kLanes<A>;
}

// Offsets, in numbers, of what a task keeps.
template <typename A>
struct Layout {
  explicit Layout(int64_t head_dim)
      : q(0),                                                  // [panels, Dh, kPanel], times scale and log2(e)
        out(q + kQueriesPerTask * head_dim),                   // [panels, Dh, kPanel], before the division by `sum`
        maximum(out + kQueriesPerTask * head_dim),             // [panels, kPanel]
        sum(maximum + kQueriesPerTask),                        // [panels, kPanel]
        k(sum + kQueriesPerTask),                              // [Dh, kKeyStride]
        v(k + head_dim * kKeyStride<A>),                       // [kKeysPerTile, value_stride]
        logits(v + kKeysPerTile * value_stride<A>(head_dim)),  // [kKeysPerTile, kPanel]
        size(logits + kKeysPerTile * kPanel<A>) {}
  int64_t q, out, maximum, sum, k, v, logits, size;
};

// Turns the logits of a tile (in powers of two) into weights under the running maximum, which it raises, and adds them
// to the running sum; correction gets what earlier weights are to be multiplied with. All per query.
template <typename A>
inline void soften(A* logits, int64_t keys, int64_t columns, A bias, A* maximum, A* sum, A* correction) {
  constexpr int lanes = kLanes<A>;
  for (int v = 0; v < kPanel<A> && v < columns; v += lanes) {
    const Vec<A> before = load(maximum + v, Full{});
    Vec<A> largest[2] = {load(logits + v, Full{}), load(logits + v, Full{})};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec<A> logit = load(logits + key * kPanel<A> + v, Full{});
      largest[key % 2] = logit > largest[key % 2] ? logit : largest[key % 2];
    }
    Vec<A> now = (largest[0] > largest[1] ? largest[0] : largest[1]) + bias;
    now = now > before ? now : before;
    const Vec<A> factor = exp2<A>(before - now);
    const Vec<A> offset = bias - now;
    Vec<A> total[2] = {load(sum + v, Full{}) * factor, Vec<A>{}};
    for (int64_t key = 0; key < keys; ++key) {
      A* logit = logits + key * kPanel<A> + v;
      const Vec<A> weight = exp2<A>(load(logit, Full{}) + offset);
      total[key % 2] += weight;
      store(logit, weight, Full{});
    }
    store(maximum + v, now, Full{});
    store(sum + v, total[0] + total[1], Full{});
    store(correction + v, factor, Full{});
  }
}

template <typename T>
void forward(const BlockAttentionQueries& task) {
  using A = Accumulator<T>;
  constexpr int64_t panel = kPanel<A>;
  const int64_t dim = task.head_dim;
  const Layout<A> layout(dim);
  A* workspace = static_cast<A*>(task.workspace);
  A* k_tile = workspace + layout.k;
  A* v_tile = workspace + layout.v;
  A* logits = workspace + layout.logits;

  for (int64_t first = 0; first < task.queries; first += panel) {
    const int64_t columns = task.queries - first < panel ? task.queries - first : panel;
    const T* q = static_cast<const T*>(task.q.data) + first * task.q.stride;
    A* q_panel = workspace + layout.q + first * dim;
    transpose_in(q, task.q.stride, columns, dim, static_cast<A>(task.scale * kLog2E), q_panel, panel);
    std::memset(workspace + layout.out + first * dim, 0, static_cast<size_t>(dim * panel) * sizeof(A));
    for (int64_t i = 0; i < panel; ++i) {
      workspace[layout.maximum + first + i] = static_cast<A>(-1e30);
      workspace[layout.sum + first + i] = 0;
    }
  }

  for (const KeyRange& range : task.ranges) {
    for (int64_t key = range.begin; key < range.end; key += kKeysPerTile) {
      const int64_t keys = range.end - key < kKeysPerTile ? range.end - key : kKeysPerTile;
      const T* k = static_cast<const T*>(task.k.data) + key * task.k.stride;
      const T* v = static_cast<const T*>(task.v.data) + key * task.v.stride;
      transpose_in(k, task.k.stride, keys, dim, static_cast<A>(1), k_tile, kKeyStride<A>);
      copy_in(v, task.v.stride, keys, dim, static_cast<A>(1), v_tile, value_stride<A>(dim));
      for (int64_t first = 0; first < task.queries; first += panel) {
        const int64_t columns = task.queries - first;
        A correction[panel];
        A* out = workspace + layout.out + first * dim;
        multiply<A, Left::transposed, Start::fresh>(
            {keys, dim, k_tile, kKeyStride<A>, workspace + layout.q + first * dim, logits, nullptr}, columns);
        soften(logits, keys, columns, static_cast<A>(range.bias * kLog2E), workspace + layout.maximum + first,
               workspace + layout.sum + first, correction);
        multiply<A, Left::transposed, Start::rescaled>(
            {dim, keys, v_tile, value_stride<A>(dim), logits, out, correction}, columns);
      }
    }
  }

  A* log_sum_exp = static_cast<A*>(task.log_sum_exp);
  for (int64_t first = 0; first < task.queries; first += panel) {
    const int64_t columns = task.queries - first < panel ? task.queries - first : panel;
    A* out = workspace + layout.out + first * dim;
    const A* sum = workspace + layout.sum + first;
    for (int64_t i = 0; i < columns; ++i) {
      log_sum_exp[first + i] = workspace[layout.maximum + first + i] * static_cast<A>(kLn2) + std::log(sum[i]);
    }
    for (int64_t v = 0; v < columns; v += kLanes<A>) {
      const Vec<A> inverse = static_cast<A>(1) / load(sum + v, Full{});
      for (int64_t d = 0; d < dim; ++d) store(out + d * panel + v, load(out + d * panel + v, Full{}) * inverse, Full{});
    }
    T* rows = static_cast<T*>(task.out.data) + first * task.out.stride;
    transpose_out(out, panel, columns, dim, static_cast<A>(1), rows, task.out.stride);
  }
}

template <typename T>
int64_t workspace_bytes(int64_t head_dim) {
  return Layout<Accumulator<T>>(head_dim).size * static_cast<int64_t>(sizeof(Accumulator<T>));
}

}  // namespace

namespace PYARD_ISA {

BlockAttentionKernel block_attention(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return {forward<double>, workspace_bytes<double>};
    case Storage::bfloat16:
      return {forward<BFloat16>, workspace_bytes<BFloat16>};
    case Storage::float16:
      return {forward<Float16>, workspace_bytes<Float16>};
    default:
      return {forward<float>, workspace_bytes<float>};
  }
}

}  // namespace PYARD_ISA
}  // namespace pyard::cpu
