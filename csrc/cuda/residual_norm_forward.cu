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
  using Stream = typename Shape::Stream;
  using Branch = typename Shape::Branch;
  constexpr int kValues = Shape::kValues;
  __shared__ float parts[2 * Shape::kGroups * Shape::kWarps * 2];
  RowSum<Shape> row_sum(parts);
  const ResidualNormForward& tensors = task.tensors;
  const ResidualNormSizes& sizes = tensors.sizes;
  const int s = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), dim = sizes.dim;
  const int first = (static_cast<int>(blockIdx.x) * Shape::kGroups + Shape::group()) * task.rows_per_group;

  Piece<Branch, kValues> gate[Shape::kPieces], shift[Shape::kPieces], scale[Shape::kPieces];
#pragma unroll
  for (int i = 0; i < Shape::kPieces; ++i) {
    if constexpr (kGate) gate[i] = load_piece<kValues>(row_of<Branch>(tensors.gate, b, s), Shape::column(i), dim);
    if constexpr (kNorm) {
      shift[i] = load_piece<kValues>(row_of<Branch>(tensors.shift, b, s), Shape::column(i), dim);
      scale[i] = load_piece<kValues>(row_of<Branch>(tensors.scale, b, s), Shape::column(i), dim);
    }
  }
  for (int r = 0; r < task.rows_per_group; ++r) {
    const int t = first + r;
    const int end = t < sizes.tokens ? dim : 0;  // a row that is not there has no columns
    Piece<Stream, kValues> row[Shape::kPieces];
    float values[kValues], other[kValues];
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i)
      row[i] = load_piece<kValues>(row_of<const Stream>(tensors.x, b, s, t), Shape::column(i), end);
    if constexpr (kGate) {
      Piece<Branch, kValues> branch[Shape::kPieces];
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        branch[i] = load_piece<kValues>(row_of<const Branch>(tensors.branch, b, s, t), Shape::column(i), end);
      }
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        float gates[kValues];
        unpack(values, row[i]), unpack(other, branch[i]), unpack(gates, gate[i]);
#pragma unroll
        for (int j = 0; j < kValues; ++j) values[j] += gates[j] * other[j];
        // The norm sees the residual as it is stored, since backward will.
        row[i] = pack_piece<Stream>(values);
        store_piece(row_of<Stream>(tensors.residual, b, s, t), Shape::column(i), end, row[i]);
      }
    }
    if constexpr (kNorm) {
      float mean, rstd;
      moments<Shape>(row, dim, sizes.eps, row_sum, mean, rstd);
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        float scales[kValues];
        unpack(values, row[i]), unpack(other, shift[i]), unpack(scales, scale[i]);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          values[j] = (values[j] - mean) * rstd * (1.0f + scales[j]) + other[j];
        }
        store_piece(row_of<Branch>(tensors.normal, b, s, t), Shape::column(i), end, pack_piece<Branch>(values));
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
  return with_scalars(sizes.scalar, sizes.narrow, [&](auto stream_scalar, auto branch_scalar) {
    return with_row_shape<decltype(stream_scalar), decltype(branch_scalar)>(sizes.dim, [&](auto shape) {
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
