// gated_residual, modulated_layer_norm and the two in one pass, backward. With normal = (residual - mean) * rstd and
// inner = grad_normal * (1 + scale):
//   dresidual = grad_residual + rstd * (inner - mean(inner) - normal * mean(inner * normal))
//   dx = dresidual, dbranch = gate * dresidual, dgate = sum_t dresidual * branch,
//   dshift = sum_t grad_normal, dscale = sum_t grad_normal * normal.
// mean and rstd are computed again from the row, which is read once. A block sums kRowsOfPart rows; a second kernel
// adds the parts in order, so that the sums have the same bits in every run.
#include <rows.cuh>

namespace pyard::cuda {
namespace {

constexpr int kRowsOfPart = 32;

// Blocks that share a multiprocessor: what the registers are rationed for.
template <typename Shape, bool kGate, bool kNorm>
inline constexpr int kResident = Shape::kThreads > 128                    ? 1
                                 : (kGate && kNorm) || Shape::kWarps == 4 ? 2
                                                                          : 3;

template <typename Shape, bool kGate, bool kNorm>
__global__ void __launch_bounds__(Shape::kThreads, kResident<Shape, kGate, kNorm>)
    backward_kernel(const ResidualNormBackward tensors) {
  using Stream = typename Shape::Stream;
  using Branch = typename Shape::Branch;
  constexpr int kValues = Shape::kValues;
  constexpr int kSums = (kGate ? 1 : 0) + (kNorm ? 2 : 0);
  constexpr int kDshift = kGate ? 1 : 0, kDscale = kDshift + 1;  // dgate is the first where there is one
  // Loads in flight are worth registers; the longest rows have none to spare.
  constexpr bool kLoadsEarly = Shape::kWarps <= 4;
  __shared__ float parts[2 * Shape::kGroups * Shape::kWarps * 2];
  RowSum<Shape> row_sum(parts);
  const ResidualNormSizes& sizes = tensors.sizes;
  const int s = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), dim = sizes.dim;
  const float of_dim = 1.0f / static_cast<float>(dim);
  const Branch* gate = kGate ? row_of<Branch>(tensors.gate, b, s) : nullptr;
  const Branch* scale = kNorm ? row_of<Branch>(tensors.scale, b, s) : nullptr;
  float sums[kSums][Shape::kPieces][kValues] = {};

  for (int r = Shape::group(); r < kRowsOfPart; r += Shape::kGroups) {
    const int t = static_cast<int>(blockIdx.x) * kRowsOfPart + r;
    const int end = t < sizes.tokens ? dim : 0;  // a row that is not there has no columns
    const Stream* residual = kNorm ? row_of<const Stream>(tensors.residual, b, s, t) : nullptr;
    const Branch* grad_normal = kNorm ? row_of<const Branch>(tensors.grad_normal, b, s, t) : nullptr;
    const Stream* grad_residual = kGate ? row_of<const Stream>(tensors.grad_residual, b, s, t) : nullptr;
    const Branch* branch = kGate ? row_of<const Branch>(tensors.branch, b, s, t) : nullptr;
    Piece<Stream, kValues> row[Shape::kPieces], early_grad[Shape::kPieces];
    Piece<Branch, kValues> grad[Shape::kPieces], early_branch[Shape::kPieces];
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      if constexpr (kNorm) {
        row[i] = load_piece<kValues>(residual, Shape::column(i), end);
        grad[i] = load_piece<kValues>(grad_normal, Shape::column(i), end);
      }
      if constexpr (kGate && kLoadsEarly) {
        early_grad[i] = load_piece<kValues>(grad_residual, Shape::column(i), end);
        early_branch[i] = load_piece<kValues>(branch, Shape::column(i), end);
      }
    }
    float mean = 0.0f, rstd = 0.0f, inner_mean = 0.0f, slope = 0.0f;
    float values[kValues], grads[kValues], factors[kValues], others[kValues];
    if constexpr (kNorm) {
      moments<Shape>(row, dim, sizes.eps, row_sum, mean, rstd);
      // A row that is not there is zeros of no variance: with eps = 0 its infinity would reach the sums over tokens.
      if (end == 0) rstd = 0.0f;
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        unpack(values, row[i]), unpack(grads, grad[i]);
        unpack(factors, load_piece<kValues>(scale, Shape::column(i), dim));
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          const float inner = grads[j] * (1.0f + factors[j]);
          inner_mean += inner;
          slope += inner * (values[j] - mean) * rstd;
        }
      }
      row_sum(inner_mean, slope);
      inner_mean *= of_dim, slope *= of_dim;
    }
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      const int column = Shape::column(i);
      float dresidual[kValues] = {};
      if constexpr (kGate) {
        unpack(dresidual, kLoadsEarly ? early_grad[i] : load_piece<kValues>(grad_residual, column, end));
      }
      if constexpr (kNorm) {
        unpack(values, row[i]), unpack(grads, grad[i]), unpack(factors, load_piece<kValues>(scale, column, dim));
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          const float normal = (values[j] - mean) * rstd;
          dresidual[j] += rstd * (grads[j] * (1.0f + factors[j]) - inner_mean - normal * slope);
          sums[kDshift][i][j] += grads[j];
          sums[kDscale][i][j] += grads[j] * normal;
        }
        store_piece(row_of<Stream>(tensors.dx, b, s, t), column, end, pack_piece<Stream>(dresidual));
      }
      if constexpr (kGate) {
        unpack(others, kLoadsEarly ? early_branch[i] : load_piece<kValues>(branch, column, end));
        unpack(factors, load_piece<kValues>(gate, column, dim));
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          sums[0][i][j] += dresidual[j] * others[j];
          dresidual[j] *= factors[j];
        }
        store_piece(row_of<Branch>(tensors.dbranch, b, s, t), column, end, pack_piece<Branch>(dresidual));
      }
    }
  }

  // [kSums, D] of this block, its groups added in order.
  const int64_t part = (static_cast<int64_t>(b) * sizes.steps + s) * gridDim.x + blockIdx.x;
  float* out = tensors.partial + part * kSums * dim;
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [kSums, D] where there are several groups
#pragma unroll 1
  for (int group = 0; group < Shape::kGroups; ++group) {
    if (group > 0) __syncthreads();
    if (group != Shape::group()) continue;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
#pragma unroll
      for (int i = 0; i < Shape::kPieces; ++i) {
        if (Shape::column(i) >= dim) continue;
#pragma unroll
        for (int j = 0; j < kValues; j += 4) {
          const int place = sum * dim + Shape::column(i) + j;
          float total[4], before[4] = {};
          if (group > 0) unpack(before, read_chunk(shared + place), float{});
#pragma unroll
          for (int l = 0; l < 4; ++l) total[l] = before[l] + sums[sum][i][j + l];
          const Chunk chunk = pack_chunk(total, float{});
          if (group + 1 == Shape::kGroups) {
            write_chunk(out + place, chunk);
          } else {
            *reinterpret_cast<Chunk*>(shared + place) = chunk;
          }
        }
      }
    }
  }
}

// Adds the parts of every (sample, step) and rounds them to their storage type.
template <typename T, bool kGate, bool kNorm>
__global__ void __launch_bounds__(128) sum_kernel(const ResidualNormBackward tensors) {
  constexpr int kSums = (kGate ? 1 : 0) + (kNorm ? 2 : 0);
  const int dim = tensors.sizes.dim, column = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  const int sum = static_cast<int>(blockIdx.y) % kSums, step = static_cast<int>(blockIdx.y) / kSums;
  const int64_t of_step = static_cast<int64_t>(blockIdx.z) * tensors.sizes.steps + step;
  if (column >= dim) return;
  const int parts = divide_up(tensors.sizes.tokens, kRowsOfPart);
  const float* part = tensors.partial + (of_step * parts * kSums + sum) * dim + column;
  float total = 0.0f;
  for (int i = 0; i < parts; ++i) total += part[static_cast<int64_t>(i) * kSums * dim];
  void* out = kGate && sum == 0 ? tensors.dgate : sum == (kGate ? 1 : 0) ? tensors.dshift : tensors.dscale;
  store_scalar(static_cast<T*>(out) + of_step * dim + column, total);
}

template <typename Shape, bool kGate, bool kNorm>
const char* run(const ResidualNormBackward& tensors, void* stream) {
  constexpr int kSums = (kGate ? 1 : 0) + (kNorm ? 2 : 0);
  const ResidualNormSizes& sizes = tensors.sizes;
  const unsigned steps = sizes.steps, batch = sizes.batch;
  const dim3 parts(divide_up(sizes.tokens, kRowsOfPart), steps, batch);
  const dim3 columns(divide_up(sizes.dim, 128), kSums * steps, batch);
  const int shared_bytes = Shape::kGroups > 1 ? kSums * sizes.dim * 4 : 0;
  const char* error =
      launch(backward_kernel<Shape, kGate, kNorm>, parts, Shape::kThreads, shared_bytes, stream, tensors);
  if (error != nullptr) return error;
  return launch(sum_kernel<typename Shape::Branch, kGate, kNorm>, columns, 128, 0, stream, tensors);
}

}  // namespace

extern "C" int pyard_cuda_residual_norm_parts(int tokens) { return divide_up(tokens, kRowsOfPart); }

extern "C" const char* pyard_cuda_residual_norm_backward(const ResidualNormBackward* arguments, void* stream) {
  const ResidualNormSizes& sizes = arguments->sizes;
  return with_scalars(sizes.scalar, sizes.narrow, [&](auto stream_scalar, auto branch_scalar) {
    return with_row_shape<decltype(stream_scalar), decltype(branch_scalar)>(sizes.dim, [&](auto shape) {
      using Shape = decltype(shape);
      if (sizes.has_norm == 0) return run<Shape, true, false>(*arguments, stream);
      if (sizes.has_gate == 0) return run<Shape, false, true>(*arguments, stream);
      return run<Shape, true, true>(*arguments, stream);
    });
  });
}

}  // namespace pyard::cuda
