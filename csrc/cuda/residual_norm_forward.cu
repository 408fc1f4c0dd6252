// gated_residual, modulated_layer_norm and the two in one pass, forward:
//   residual = x + gate * branch,   normal = (residual - mean) * rstd * (1 + scale) + shift.
// Rows are read once and held in registers; gate, shift and scale of a step stay there from row to row.
#include <rows.cuh>

namespace pyard::cuda {
namespace {

struct Task {
  ResidualNormForward tensors;
  int rows_per_group;
};

template <typename Shape, bool kGate, bool kNorm>
__global__ void __launch_bounds__(Shape::kThreads) forward_kernel(const Task task) {
  using T = typename Shape::T;
  __shared__ float parts[2 * Shape::kGroups * Shape::kWarps * 2];
  RowSum<Shape> row_sum(parts);
  const ResidualNormForward& tensors = task.tensors;
  const ResidualNormSizes& sizes = tensors.sizes;
  const int s = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), dim = sizes.dim;
  const int first = (static_cast<int>(blockIdx.x) * Shape::kGroups + Shape::group()) * task.rows_per_group;

  Chunk gate[Shape::kChunks], shift[Shape::kChunks], scale[Shape::kChunks];
#pragma unroll
  for (int i = 0; i < Shape::kChunks; ++i) {
    if constexpr (kGate) gate[i] = load_chunk(row_of<T>(tensors.gate, b, s), Shape::column(i), dim);
    if constexpr (kNorm) {
      shift[i] = load_chunk(row_of<T>(tensors.shift, b, s), Shape::column(i), dim);
      scale[i] = load_chunk(row_of<T>(tensors.scale, b, s), Shape::column(i), dim);
    }
  }
  for (int r = 0; r < task.rows_per_group; ++r) {
    const int t = first + r;
    const int end = t < sizes.tokens ? dim : 0;  // a row that is not there has no columns
    Chunk row[Shape::kChunks];
    float values[Shape::kValues], other[Shape::kValues];
#pragma unroll
    for (int i = 0; i < Shape::kChunks; ++i)
      row[i] = load_chunk(row_of<const T>(tensors.x, b, s, t), Shape::column(i), end);
    if constexpr (kGate) {
      Chunk branch[Shape::kChunks];
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        branch[i] = load_chunk(row_of<const T>(tensors.branch, b, s, t), Shape::column(i), end);
      }
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        float gates[Shape::kValues];
        unpack(values, row[i], T{}), unpack(other, branch[i], T{}), unpack(gates, gate[i], T{});
#pragma unroll
        for (int j = 0; j < Shape::kValues; ++j) values[j] += gates[j] * other[j];
        // The norm sees the residual as it is stored, since backward will.
        row[i] = pack_chunk(values, T{});
        store_chunk(row_of<T>(tensors.residual, b, s, t), Shape::column(i), end, row[i]);
      }
    }
    if constexpr (kNorm) {
      float mean, rstd;
      moments<Shape>(row, dim, sizes.eps, row_sum, mean, rstd);
#pragma unroll
      for (int i = 0; i < Shape::kChunks; ++i) {
        float scales[Shape::kValues];
        unpack(values, row[i], T{}), unpack(other, shift[i], T{}), unpack(scales, scale[i], T{});
#pragma unroll
        for (int j = 0; j < Shape::kValues; ++j) {
          values[j] = (values[j] - mean) * rstd * (1.0f + scales[j]) + other[j];
        }
        store_chunk(row_of<T>(tensors.normal, b, s, t), Shape::column(i), end, pack_chunk(values, T{}));
      }
    }
  }
}

}  // namespace

extern "C" const char* pyard_cuda_residual_norm_forward(const ResidualNormForward* arguments, void* stream) {
  const ResidualNormSizes& sizes = arguments->sizes;
  // Few rows: one for each group, to fill the device. Many: four, so that shift and scale are read a quarter as often.
  constexpr int64_t kManyRows = 16384;
  const int rows = static_cast<int64_t>(sizes.batch) * sizes.steps * sizes.tokens < kManyRows ? 1 : 4;
  const Task task{*arguments, rows};
  return with_scalar(sizes.scalar, [&](auto scalar) {
    return with_row_shape<decltype(scalar)>(sizes.dim, [&](auto shape) {
      using Shape = decltype(shape);
      const dim3 grid(divide_up(sizes.tokens, Shape::kGroups * rows), sizes.steps, sizes.batch);
      const auto kernel = sizes.has_norm == 0   ? forward_kernel<Shape, true, false>
                          : sizes.has_gate == 0 ? forward_kernel<Shape, false, true>
                                                : forward_kernel<Shape, true, true>;
      return launch(kernel, grid, Shape::kThreads, 0, stream, task);
    });
  });
}

}  // namespace pyard::cuda
