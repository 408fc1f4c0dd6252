#include "trajectory/gatherer.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace pyard::trajectory {
namespace {

// What a thread takes at a time: long enough to make the lock cheap, short enough to share a batch.
constexpr uint64_t kBytesAtOnce = 512 * 1024;

// Mapped pages count as the process's memory. A store larger than this lets go of them now and then, so that the count
// stays bounded; more often would cost page faults.
constexpr uint64_t kMaxMappedBytes = uint64_t{2} << 30;
// Linux maps so much around the page that is read first, if it is in the page cache.
constexpr uint64_t kFaultAroundBytes = 64 * 1024;

uint64_t mapped_by_reading(uint64_t bytes) { return (bytes / kFaultAroundBytes + 1) * kFaultAroundBytes; }

size_t place_of(const std::vector<TensorLayout>& tensors, const std::string& name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name; });
  if (found == tensors.end()) throw InputError("the store keeps no '" + name + "'");
  return static_cast<size_t>(found - tensors.begin());
}

}  // namespace

Gatherer::Gatherer(const StoreLayout& store, size_t num_threads)
    : shard_size_(store.shard_size), num_classes_(store.num_classes), owner_(getpid()) {
  if (store.paths.size() != store.counts.size() || shard_size_ == 0 || num_threads == 0) {
    throw InputError("found " + std::to_string(store.paths.size()) + " paths, " + std::to_string(store.counts.size()) +
                     " counts, shard_size " + std::to_string(shard_size_) + " and " + std::to_string(num_threads) +
                     " threads; expected a count for each path, and a shard_size and threads of at least 1");
  }
  noise_ = place_of(store.tensors, "noise");
  target_ = place_of(store.tensors, store.target);
  label_ = place_of(store.tensors, "label");
  const TensorLayout &noise = store.tensors[noise_], &target = store.tensors[target_];
  if (store.tensors[label_].num_bytes() != 8) throw InputError("expected one I64 label for each sample");
  noise_stride_ = noise.num_bytes();
  target_stride_ = target.num_bytes();
  noise_elements_ = noise_stride_ / bytes_of(noise.dtype);
  target_elements_ = target_stride_ / bytes_of(target.dtype);
  noise_bytes_ = noise_elements_ * bytes_of(store.output);
  frame_bytes_ = noise_bytes_ + target_elements_ * bytes_of(store.output);
  if (noise_elements_ == 0 || target_elements_ % noise_elements_ != 0) {
    throw InputError("expected as many whole frames of '" + store.target + "' as there are steps");
  }
  convert_noise_ = converter(noise.dtype, store.output);
  convert_target_ = converter(target.dtype, store.output);
  rows_at_once_ = static_cast<size_t>(std::max<uint64_t>(1, kBytesAtOnce / frame_bytes_));
  for (size_t i = 0; i < store.paths.size(); ++i) {
    const uint64_t samples = store.counts[i];
    if (samples == 0 || samples > shard_size_ || (samples < shard_size_ && i + 1 < store.paths.size())) {
      throw InputError(store.paths[i] + ": " + std::to_string(samples) + " samples; expected " +
                       std::to_string(shard_size_) + ", fewer in the last shard only");
    }
    std::vector<TensorLayout> layout = store.tensors;
    for (TensorLayout& tensor : layout) tensor.shape.insert(tensor.shape.begin(), samples);
    shards_.push_back(std::make_unique<MappedShard>(store.paths[i], layout));
    store_bytes_ += shards_.back()->size();
    count_ += samples;
  }
  try {
    for (size_t i = 0; i < num_threads; ++i) threads_.emplace_back(&Gatherer::work, this);
  } catch (const std::exception& error) {  // the system has no more of them: none may be left running
    const size_t started = threads_.size();
    stop();
    throw InputError("only " + std::to_string(started) + " of " + std::to_string(num_threads) +
                     " reader threads could be started (" + error.what() + "); ask for fewer: num_threads");
  }
}

Gatherer::~Gatherer() { stop(); }

void Gatherer::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    while (!queue_.empty()) drop_rows_not_begun(queue_.front(), "the reader was closed");
  }
  work_to_do_.notify_all();
  rows_written_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<Batch> Gatherer::submit(std::vector<int64_t> indices, uint8_t* frames, int64_t* labels) {
  if (getpid() != owner_) {
    throw InputError(
        "this reader belongs to the process that made it: its threads do not survive a fork; make one here");
  }
  for (const int64_t index : indices) {
    if (index < 0 || static_cast<uint64_t>(index) >= count_) {
      throw InputError("sample " + std::to_string(index) + "; expected 0 to " + std::to_string(count_ - 1));
    }
  }
  auto batch = std::make_shared<Batch>();
  batch->rows_left = indices.size();
  batch->indices = std::move(indices);
  batch->frames = frames;
  batch->labels = labels;
  if (batch->done()) return batch;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(batch);
  }
  work_to_do_.notify_all();
  return batch;
}

void Gatherer::wait(const std::shared_ptr<Batch>& batch) {
  std::unique_lock<std::mutex> lock(mutex_);
  rows_written_.wait(lock, [&] { return batch->done(); });
  if (!batch->error.empty()) throw InputError(batch->error);
}

void Gatherer::abandon(const std::shared_ptr<Batch>& batch) {
  if (getpid() != owner_) return;
  std::unique_lock<std::mutex> lock(mutex_);
  drop_rows_not_begun(batch, "the batch was abandoned");
  rows_written_.wait(lock, [&] { return batch->done(); });
}

// The lock is held.
void Gatherer::drop_rows_not_begun(std::shared_ptr<Batch> batch, const char* reason) {
  const auto queued = std::find(queue_.begin(), queue_.end(), batch);
  if (queued == queue_.end()) return;
  batch->error = reason;
  batch->rows_left -= batch->indices.size() - batch->next_row;
  batch->next_row = batch->indices.size();
  queue_.erase(queued);
}

void Gatherer::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_to_do_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<Batch> batch = queue_.front();
    const size_t begin = batch->next_row, end = std::min(begin + rows_at_once_, batch->indices.size());
    batch->next_row = end;
    if (end == batch->indices.size()) queue_.pop_front();
    lock.unlock();
    std::string error;
    for (size_t row = begin; row < end; ++row) {
      try {
        copy_row(*batch, row);
      } catch (const std::exception& failure) {
        error = failure.what();
      }
    }
    bound_memory((end - begin) * (mapped_by_reading(noise_stride_) + mapped_by_reading(target_stride_)));
    lock.lock();
    if (!error.empty()) batch->error = std::move(error);
    batch->rows_left -= end - begin;
    if (batch->done()) rows_written_.notify_all();
  }
}

void Gatherer::bound_memory(uint64_t bytes) {
  if (store_bytes_ <= kMaxMappedBytes) return;
  const uint64_t before = bytes_mapped_.fetch_add(bytes);
  if (before / kMaxMappedBytes == (before + bytes) / kMaxMappedBytes) return;
  for (const auto& shard : shards_) shard->unload();
}

void Gatherer::copy_row(const Batch& batch, size_t row) {
  const uint64_t sample = static_cast<uint64_t>(batch.indices[row]);
  const MappedShard& shard = *shards_[sample / shard_size_];
  const uint64_t place = sample % shard_size_;
  uint8_t* frames = batch.frames + row * frame_bytes_;
  convert_noise_(shard.tensor(noise_) + place * noise_stride_, frames, noise_elements_);
  convert_target_(shard.tensor(target_) + place * target_stride_, frames + noise_bytes_, target_elements_);
  std::memcpy(&batch.labels[row], shard.tensor(label_) + place * sizeof(int64_t), sizeof(int64_t));
  if (batch.labels[row] < 0 || batch.labels[row] >= num_classes_) {
    throw InputError("sample " + std::to_string(sample) + " has label " + std::to_string(batch.labels[row]) +
                     "; the teacher's classes are 0 to " + std::to_string(num_classes_ - 1));
  }
}

}  // namespace pyard::trajectory
