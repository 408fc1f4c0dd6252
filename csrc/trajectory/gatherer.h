// Gathers random samples of a store into a caller's buffers with a pool of threads, batches ahead of their use.
//
//   B batch, S num_steps, (C, H, W) sample; frames of a batch: [B, 1 + S, C, H, W], the noise first.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "trajectory/convert.h"
#include "trajectory/shard.h"

namespace pyard::trajectory {

struct StoreLayout {
  std::vector<std::string> paths;  // shards, in order
  std::vector<uint64_t> counts;    // samples in each; all but the last hold shard_size
  uint64_t shard_size = 0;
  std::vector<TensorLayout> tensors;  // of one sample: shapes without the leading n
  std::string target;                 // the tensor that follows the noise: "state" or "denoised"
  DType output = DType::kFloat32;     // of the frames
  int64_t num_classes = 0;            // labels are 0 ... num_classes - 1
};

// One batch on its way. Shared by the thread that waits for it and those that fill it.
struct Batch {
  std::vector<int64_t> indices;  // [B] sample numbers
  uint8_t* frames = nullptr;     // [B, 1 + S, C, H, W] of the output dtype, written by the pool until `done`
  int64_t* labels = nullptr;     // [B]
  size_t next_row = 0;           // rows below it are done or in some thread's hands
  size_t rows_left = 0;          // rows not yet written
  std::string error;             // why rows were given up
  bool done() const { return rows_left == 0; }
};

class Gatherer {
 public:
  // Maps every shard and checks its header; throws InputError naming the file.
  Gatherer(const StoreLayout& store, size_t num_threads);
  ~Gatherer();  // gives up what is not done; no thread writes to any buffer afterwards
  Gatherer(const Gatherer&) = delete;
  Gatherer& operator=(const Gatherer&) = delete;

  uint64_t frame_bytes() const { return frame_bytes_; }  // of one sample: [1 + S, C, H, W]

  // Starts to fill `frames` and `labels`, which must outlive the batch; throws InputError for an index out of range.
  std::shared_ptr<Batch> submit(std::vector<int64_t> indices, uint8_t* frames, int64_t* labels);

  void wait(const std::shared_ptr<Batch>& batch);     // until it is done; throws InputError if rows were given up
  void abandon(const std::shared_ptr<Batch>& batch);  // until no thread writes to it any more

 private:
  void stop();
  void work();
  void copy_row(const Batch& batch, size_t row);
  void bound_memory(uint64_t bytes);
  void drop_rows_not_begun(std::shared_ptr<Batch> batch, const char* reason);

  std::vector<std::unique_ptr<MappedShard>> shards_;
  uint64_t shard_size_;
  uint64_t count_ = 0;
  int64_t num_classes_;
  size_t noise_ = 0, target_ = 0, label_ = 0;          // places in the layout
  uint64_t noise_elements_ = 0, target_elements_ = 0;  // of one sample
  uint64_t noise_stride_ = 0, target_stride_ = 0;      // bytes of one sample in its shard
  uint64_t noise_bytes_ = 0, frame_bytes_ = 0;         // bytes in the output
  Convert convert_noise_ = nullptr, convert_target_ = nullptr;
  size_t rows_at_once_ = 1;
  uint64_t store_bytes_ = 0;
  std::atomic<uint64_t> bytes_mapped_{0};  // by reading, at most, since the beginning
  pid_t owner_;

  std::mutex mutex_;
  std::condition_variable work_to_do_, rows_written_;
  std::deque<std::shared_ptr<Batch>> queue_;  // batches with rows that no thread has taken, oldest first
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace pyard::trajectory
