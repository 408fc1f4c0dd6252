// Kernels with one fault each: what test_cuda_sanitized.py must see fail. The fault's name is the only argument.
#include <launchers.h>

#include <cstdio>
#include <cstring>
#include <machine.cuh>

namespace {

using namespace pyard::cuda;

constexpr int kThreads = 64;

struct Task {
  int fault;
  float* out;  // [kThreads]
};

enum Fault { kNone, kNoBlockBarrier, kNoWarpBarrier, kNoWait, kBeyondGlobal, kBeyondShared };
const char* const kFaults[] = {"none",    "no_block_barrier", "no_warp_barrier",
                               "no_wait", "beyond_global",    "beyond_shared"};

// Every thread passes its number to the next one of its block, then to the next one of its warp, and copies 16 bytes.
__global__ void kernel(const Task task) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [3 * kThreads]
  const int thread = static_cast<int>(threadIdx.x), fault = task.fault;
  shared[thread + (fault == kBeyondShared ? 2 * kThreads + 1 : 0)] = static_cast<float>(thread);
  if (fault != kNoBlockBarrier) __syncthreads();
  const float passed = shared[(thread + 1) % kThreads];
  float* second = shared + kThreads;
  second[thread] = passed;
  if (fault != kNoWarpBarrier) __syncwarp();
  float sum = second[thread / 32 * 32 + (thread + 1) % 32];
  float* third = second + kThreads;
  if (thread < kThreads / 4) copy_async(third + 4 * thread, task.out + 4 * thread, true);
  copy_async_commit();
  if (fault != kNoWait) copy_async_wait();
  __syncthreads();
  sum += third[thread];
  if (fault == kNoWait) copy_async_wait();
  __syncthreads();
  task.out[thread + (fault == kBeyondGlobal ? 1 : 0)] = sum;
}

}  // namespace

int main(int, char** words) {
  Task task{kNone, nullptr};
  while (std::strcmp(words[1], kFaults[task.fault]) != 0) ++task.fault;
  void* out = nullptr;
  cudaMalloc(&out, kThreads * sizeof(float));
  cudaMemset(out, 0, kThreads * sizeof(float));
  task.out = static_cast<float*>(out);
  const char* error = launch(kernel, dim3(1), kThreads, 3 * kThreads * 4, nullptr, task);
  std::printf("%s\n", error == nullptr ? "ran" : error);
  return error == nullptr ? 0 : 1;
}
