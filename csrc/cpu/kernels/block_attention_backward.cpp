// Gradients of attention from the saved log-sum-exp (Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 4), one
// head at a time: for each step of keys, all tiles of queries that see it. Vector lanes are keys, so that weights and
// their gradients are operands of the next products as they lie. Compiled once per instruction set.
#include "block_attention.h"
#include "exp2.h"
#include "gemm.h"

namespace pyard::cpu {
namespace {

constexpr int64_t kQueryTile = 72;  // a multiple of every kTileRows

template <typename A>
constexpr int64_t kQueryStride = kQueryTile + kLanes<A>;  // as large powers of two would meet in one cache set

int64_t tiles_of(int64_t tokens) { return (tokens + kQueryTile - 1) / kQueryTile; }

// Offsets, in numbers, of what one head keeps: linear in the tokens of all steps.
template <typename A>
struct Layout {
  Layout(int64_t query_steps, int64_t tokens, int64_t dim)
      : key_panels((tokens + kPanel<A> - 1) / kPanel<A>),
        dim_panels((dim + kPanel<A> - 1) / kPanel<A>),
        tile((tokens + tiles_of(tokens) - 1) / tiles_of(tokens)),
        row(round_up(dim, kLanes<A>) + kLanes<A>),
        panels(key_panels * kPanel<A> * dim),
        dq(0),  // [tiles, dim_panels, tile, kPanel]
        offset(dq + query_steps * tiles_of(tokens) * dim_panels * tile * kPanel<A>),  // [tiles, tile]
        delta(offset + query_steps * tiles_of(tokens) * tile),                        // [tiles, tile]
        k_columns(round_up(delta + query_steps * tiles_of(tokens) * tile, 16)),       // [key_panels, Dh, kPanel]
        v_columns(k_columns + panels),                                                // [key_panels, Dh, kPanel]
        dk(v_columns + panels),                                                       // [key_panels, Dh, kPanel]
        dv(dk + panels),                                                              // [key_panels, Dh, kPanel]
        k_rows(dv + panels),  // [key_panels, dim_panels, kPanel keys, kPanel]
        q_columns(k_rows + key_panels * dim_panels * kPanel<A> * kPanel<A>),  // [Dh, kQueryStride]
        grad_columns(q_columns + dim * kQueryStride<A>),                      // [Dh, kQueryStride]
        q_rows(grad_columns + dim * kQueryStride<A>),                         // [tile, row]
        grad_rows(q_rows + kQueryTile * row),                                 // [tile, row]
        weights(grad_rows + kQueryTile * row),                                // [tile, kPanel]
        dlogits(weights + kQueryTile * kPanel<A>),                            // [tile, kPanel]
        size(dlogits + kQueryTile * kPanel<A>) {}
  int64_t key_panels, dim_panels, tile, row, panels;
  int64_t dq, offset, delta, k_columns, v_columns, dk, dv, k_rows, q_columns, grad_columns, q_rows, grad_rows, weights,
      dlogits, size;
};

template <typename T>
class Head {
 public:
  using A = Accumulator<T>;

  explicit Head(const BlockAttentionHead& task)
      : task_(task),
        at_(task.mask.query_steps, task.tokens_per_step, task.head_dim),
        dim_(task.head_dim),
        tokens_(task.tokens_per_step),
        tiles_(tiles_of(task.tokens_per_step)),
        space_(static_cast<A*>(task.workspace)) {}

  void run() {
    start_queries();
    const int64_t first = task_.mask.key_steps - task_.mask.query_steps;
    for (int64_t key_step = 0; key_step < task_.mask.key_steps; ++key_step) {
      start_keys(key_step);
      const Steps seen = steps_that_see(task_.mask, key_step);
      for (int64_t step = seen.begin; step < seen.end; ++step) {
        for (int64_t tile = 0; tile < tiles_; ++tile) add_tile((step - first) * tiles_ + tile, step != key_step);
      }
      finish_keys(key_step);
    }
    finish_queries();
    if (task_.dbias != nullptr) *static_cast<A*>(task_.dbias) = dbias_;
  }

 private:
  static constexpr int64_t kWidth = kPanel<A>;
  static constexpr A kOne = static_cast<A>(1);

  static const T* rows(const Tokens& tokens, int64_t row) {
    return static_cast<const T*>(tokens.data) + row * tokens.stride;
  }
  static T* rows(const MutableTokens& tokens, int64_t row) {
    return static_cast<T*>(tokens.data) + row * tokens.stride;
  }

  // Tile `index` counts over all query steps; tiles never cross a step.
  int64_t first_token(int64_t index) const { return index / tiles_ * tokens_ + index % tiles_ * at_.tile; }
  int64_t tile_tokens(int64_t index) const {
    const int64_t rest = tokens_ - index % tiles_ * at_.tile;
    return rest < at_.tile ? rest : at_.tile;
  }

  // Per query: delta = grad . out, and the log-sum-exp in powers of two.
  void start_queries() {
    const int64_t all = task_.mask.query_steps * tiles_;
    std::memset(space_ + at_.dq, 0, static_cast<size_t>(all * at_.dim_panels * at_.tile * kWidth) * sizeof(A));
    for (int64_t index = 0; index < all; ++index) {
      for (int64_t i = 0; i < tile_tokens(index); ++i) {
        const int64_t token = first_token(index) + i;
        const T* grad = rows(task_.grad, token);
        const T* out = rows(task_.out, token);
        space_[at_.delta + index * at_.tile + i] =
            sum_over<A>(dim_, [&](int64_t d, auto part) { return load(grad + d, part) * load(out + d, part); });
        space_[at_.offset + index * at_.tile + i] =
            static_cast<const A*>(task_.log_sum_exp)[token] * static_cast<A>(-kLog2E);
      }
    }
  }

  void start_keys(int64_t step) {
    std::memset(space_ + at_.dk, 0, static_cast<size_t>(2 * at_.panels) * sizeof(A));
    for (int64_t panel = 0; panel < at_.key_panels; ++panel) {
      const int64_t keys = panel_keys(panel);
      const T* k = rows(task_.k, step * tokens_ + panel * kWidth);
      const T* v = rows(task_.v, step * tokens_ + panel * kWidth);
      transpose_in(k, task_.k.stride, keys, dim_, kOne, space_ + at_.k_columns + panel * dim_ * kWidth, kWidth);
      transpose_in(v, task_.v.stride, keys, dim_, kOne, space_ + at_.v_columns + panel * dim_ * kWidth, kWidth);
      for (int64_t d = 0; d < at_.dim_panels; ++d) {
        copy_in(k + d * kWidth, task_.k.stride, keys, dim_in_panel(d), kOne, k_rows(panel, d), kWidth);
      }
    }
  }

  void add_tile(int64_t index, bool earlier) {
    const int64_t queries = tile_tokens(index);
    const T* q = rows(task_.q, first_token(index));
    const T* grad = rows(task_.grad, first_token(index));
    A* q_columns = space_ + at_.q_columns;
    A* grad_columns = space_ + at_.grad_columns;
    A* q_rows = space_ + at_.q_rows;
    A* grad_rows = space_ + at_.grad_rows;
    A* weights = space_ + at_.weights;
    A* dlogits = space_ + at_.dlogits;
    const A to_log2 = static_cast<A>(task_.scale * kLog2E);
    transpose_in(q, task_.q.stride, queries, dim_, to_log2, q_columns, kQueryStride<A>);
    transpose_in(grad, task_.grad.stride, queries, dim_, kOne, grad_columns, kQueryStride<A>);
    copy_in(q, task_.q.stride, queries, dim_, kOne, q_rows, at_.row);
    copy_in(grad, task_.grad.stride, queries, dim_, kOne, grad_rows, at_.row);

    for (int64_t panel = 0; panel < at_.key_panels; ++panel) {
      const int64_t keys = panel_keys(panel);
      const int64_t here = panel * dim_ * kWidth;
      multiply<A, Left::transposed, Start::fresh>(
          {queries, dim_, q_columns, kQueryStride<A>, space_ + at_.k_columns + here, weights, nullptr}, keys);
      multiply<A, Left::transposed, Start::fresh>(
          {queries, dim_, grad_columns, kQueryStride<A>, space_ + at_.v_columns + here, dlogits, nullptr}, keys);
      soften(index, queries, keys, earlier);
      multiply<A, Left::transposed, Start::onto>(
          {dim_, queries, grad_rows, at_.row, weights, space_ + at_.dv + here, nullptr}, keys);
      multiply<A, Left::transposed, Start::onto>(
          {dim_, queries, q_rows, at_.row, dlogits, space_ + at_.dk + here, nullptr}, keys);
      for (int64_t d = 0; d < at_.dim_panels; ++d) {
        multiply<A, Left::panel, Start::onto>({queries, keys, dlogits, kWidth, k_rows(panel, d), dq(index, d), nullptr},
                                              dim_in_panel(d));
      }
    }
  }

  // Logits to weights p = exp(logit - log_sum_exp), and their gradients to those of the logits, p * (dp - delta).
  void soften(int64_t index, int64_t queries, int64_t keys, bool earlier) {
    const A* offset = space_ + at_.offset + index * at_.tile;
    const A* delta = space_ + at_.delta + index * at_.tile;
    const A bias = static_cast<A>(earlier ? task_.bias * kLog2E : 0.0);
    Vec<A> total[2] = {};
    for (int64_t i = 0; i < queries; ++i) {
      for (int v = 0; v * kLanes<A> < keys && v < 2; ++v) {
        A* weight = space_ + at_.weights + i * kWidth + v * kLanes<A>;
        A* dlogit = space_ + at_.dlogits + i * kWidth + v * kLanes<A>;
        const Vec<A> p = exp2<A>(load(weight, Full{}) + (offset[i] + bias));
        const Vec<A> ds = p * (load(dlogit, Full{}) - delta[i]);
        store(weight, p, Full{});
        store(dlogit, ds, Full{});
        total[v] += ds;
      }
    }
    if (!earlier || task_.dbias == nullptr) return;
    for (int64_t key = 0; key < keys; ++key) dbias_ += total[key / kLanes<A>][key % kLanes<A>];
  }

  void finish_keys(int64_t step) {
    for (int64_t panel = 0; panel < at_.key_panels; ++panel) {
      const int64_t keys = panel_keys(panel);
      const int64_t here = panel * dim_ * kWidth;
      const int64_t first = step * tokens_ + panel * kWidth;
      transpose_out(space_ + at_.dk + here, kWidth, keys, dim_, static_cast<A>(task_.scale), rows(task_.dk, first),
                    task_.dk.stride);
      transpose_out(space_ + at_.dv + here, kWidth, keys, dim_, kOne, rows(task_.dv, first), task_.dv.stride);
    }
  }

  void finish_queries() {
    for (int64_t index = 0; index < task_.mask.query_steps * tiles_; ++index) {
      for (int64_t d = 0; d < at_.dim_panels; ++d) {
        for (int64_t i = 0; i < tile_tokens(index); ++i) {
          T* to = rows(task_.dq, first_token(index) + i) + d * kWidth;
          const A* from = dq(index, d) + i * kWidth;
          for_each_vector<A>(dim_in_panel(d), [&](int64_t j, auto part) {
            store(to + j, load(from + j, Full{}) * static_cast<A>(task_.scale), part);
          });
        }
      }
    }
  }

  int64_t panel_keys(int64_t panel) const {
    const int64_t rest = tokens_ - panel * kWidth;
    return rest < kWidth ? rest : kWidth;
  }
  int64_t dim_in_panel(int64_t panel) const {
    const int64_t rest = dim_ - panel * kWidth;
    return rest < kWidth ? rest : kWidth;
  }
  A* k_rows(int64_t panel, int64_t d) const {  // [kPanel keys, kPanel]
    return space_ + at_.k_rows + (panel * at_.dim_panels + d) * kWidth * kWidth;
  }
  A* dq(int64_t index, int64_t d) const {  // [tile, kPanel]
    return space_ + at_.dq + (index * at_.dim_panels + d) * at_.tile * kWidth;
  }

  const BlockAttentionHead& task_;
  const Layout<A> at_;
  const int64_t dim_, tokens_, tiles_;
  A* const space_;
  A dbias_ = 0;
};

template <typename T>
void backward(const BlockAttentionHead& task) {
  Head<T>(task).run();
}

template <typename T>
int64_t workspace_bytes(int64_t query_steps, int64_t tokens_per_step, int64_t head_dim) {
  using A = Accumulator<T>;
  return Layout<A>(query_steps, tokens_per_step, head_dim).size * static_cast<int64_t>(sizeof(A));
}

}  // namespace

namespace PYARD_ISA {

BlockAttentionBackwardKernel block_attention_backward(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return {backward<double>, workspace_bytes<double>};
    case Storage::bfloat16:
      return {backward<BFloat16>, workspace_bytes<BFloat16>};
    case Storage::float16:
      return {backward<Float16>, workspace_bytes<Float16>};
    default:
      return {backward<float>, workspace_bytes<float>};
  }
}

}  // namespace PYARD_ISA
}  // namespace pyard::cpu
