// One shard: a safetensors file whose header must say exactly what the store's manifest makes it say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "trajectory/json.h"

namespace pyard::trajectory {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt64 };

// safetensors' name of a dtype ("F32", "F16", "BF16", "I64"); throws InputError for any other.
DType dtype_of(std::string_view name);
std::string_view name_of(DType dtype);
size_t bytes_of(DType dtype);

struct TensorLayout {
  std::string name;
  DType dtype;
  std::vector<uint64_t> shape;

  uint64_t num_bytes() const;  // throws InputError where that overflows
};

// Checks the header of a safetensors file against the tensors it must hold: no more, no less, of that dtype and shape,
// aligned, without overlaps or holes, and ending where the file ends.
//
//   file    the whole file, `size` bytes; only the header is read
//   return  where in the file each tensor of `layout` begins
//
// Throws InputError. Format: https://github.com/huggingface/safetensors#format
std::vector<uint64_t> parse_shard(const uint8_t* file, uint64_t size, const std::vector<TensorLayout>& layout);

// A shard mapped into memory, its header checked; unmapped on destruction.
class MappedShard {
 public:
  MappedShard(const std::string& path, const std::vector<TensorLayout>& layout);
  ~MappedShard();
  MappedShard(const MappedShard&) = delete;
  MappedShard& operator=(const MappedShard&) = delete;

  // First byte of the tensor at `layout[index]`.
  const uint8_t* tensor(size_t index) const { return file_ + offsets_[index]; }

  uint64_t size() const { return size_; }

  // Lets go of the pages that were read; they are found again, in the page cache or on the disk, when they are needed.
  void unload() const;

 private:
  const uint8_t* file_ = nullptr;
  uint64_t size_ = 0;
  std::vector<uint64_t> offsets_;
};

}  // namespace pyard::trajectory
