#include "trajectory/shard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace pyard::trajectory {
namespace {

// A shard has at most four tensors and one metadata entry; the reference implementation's own limit is 100 MB.
constexpr uint64_t kMaxHeaderBytes = 1 << 16;
constexpr uint64_t kPrefixBytes = 8;

constexpr struct {
  DType dtype;
  std::string_view name;
  size_t bytes;
} kDTypes[] = {
    {DType::kFloat32, "F32", 4}, {DType::kFloat16, "F16", 2}, {DType::kBFloat16, "BF16", 2}, {DType::kInt64, "I64", 8}};

uint64_t little_endian(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

std::string text_of(const std::vector<uint64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool is_shape(const JsonValue* value, const std::vector<uint64_t>& shape) {
  return value != nullptr && value->kind == JsonValue::Kind::kArray &&
         std::equal(value->items.begin(), value->items.end(), shape.begin(), shape.end(),
                    [](const JsonValue& item, uint64_t size) {
                      return item.kind == JsonValue::Kind::kWhole && item.whole == size;
                    });
}

// [begin, end) of a tensor in the payload.
std::pair<uint64_t, uint64_t> span_of(const JsonValue& header, const TensorLayout& tensor, uint64_t data_size) {
  const std::string who = "tensor '" + tensor.name + "'";
  const JsonValue* entry = header.find(tensor.name);
  if (entry == nullptr) throw InputError("holds no " + who + "; the manifest says it does");
  const JsonValue* dtype = entry->find("dtype");
  if (dtype == nullptr || dtype->kind != JsonValue::Kind::kString || dtype->text != name_of(tensor.dtype) ||
      !is_shape(entry->find("shape"), tensor.shape)) {
    throw InputError(who + " has another dtype or shape; the manifest says " + std::string(name_of(tensor.dtype)) +
                     " " + text_of(tensor.shape));
  }
  const JsonValue* offsets = entry->find("data_offsets");
  if (offsets == nullptr || offsets->items.size() != 2 || offsets->items[0].kind != JsonValue::Kind::kWhole ||
      offsets->items[1].kind != JsonValue::Kind::kWhole) {
    throw InputError(who + " has no data_offsets [begin, end]");
  }
  const uint64_t begin = offsets->items[0].whole, end = offsets->items[1].whole;
  if (begin > end || end > data_size || end - begin != tensor.num_bytes() || begin % bytes_of(tensor.dtype) != 0) {
    throw InputError(who + " has data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) + "]; expected " +
                     std::to_string(tensor.num_bytes()) + " aligned bytes within the " + std::to_string(data_size) +
                     " that follow the header");
  }
  return {begin, end};
}

}  // namespace

DType dtype_of(std::string_view name) {
  for (const auto& known : kDTypes) {
    if (known.name == name) return known.dtype;
  }
  throw InputError("dtype '" + std::string(name) + "'; expected F32, F16, BF16 or I64");
}

std::string_view name_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

size_t bytes_of(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].bytes; }

uint64_t TensorLayout::num_bytes() const {
  uint64_t bytes = bytes_of(dtype);
  for (uint64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw InputError("tensor '" + name + "' is too large");
  }
  return bytes;
}

std::vector<uint64_t> parse_shard(const uint8_t* file, uint64_t size, const std::vector<TensorLayout>& layout) {
  const uint64_t header_size = size < kPrefixBytes ? 0 : little_endian(file);
  if (header_size < 2 || header_size > std::min(size - kPrefixBytes, kMaxHeaderBytes)) {
    throw InputError(std::to_string(size) + " bytes with a header of " + std::to_string(header_size) +
                     ": not a shard, or truncated");
  }
  const uint64_t payload = kPrefixBytes + header_size;
  const JsonValue header = parse_json({reinterpret_cast<const char*>(file) + kPrefixBytes, header_size});
  if (header.kind != JsonValue::Kind::kObject) throw InputError("header is not a JSON object");
  const size_t tensors = header.members.size() - (header.find("__metadata__") != nullptr ? 1 : 0);
  if (tensors != layout.size()) {
    throw InputError("holds " + std::to_string(tensors) + " tensors; the manifest says " +
                     std::to_string(layout.size()));
  }
  std::vector<uint64_t> begins;
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const TensorLayout& tensor : layout) {
    spans.push_back(span_of(header, tensor, size - payload));
    // The manifest's shapes are multiples of the element size from an aligned payload on, but a file's payload need not
    // be: numbers are read by memcpy.
    begins.push_back(payload + spans.back().first);
  }
  std::sort(spans.begin(), spans.end());
  uint64_t expected = 0;
  for (const auto& [begin, end] : spans) {
    if (begin != expected) {
      throw InputError("a tensor begins at " + std::to_string(begin) + ", expected " + std::to_string(expected) +
                       ": tensors overlap or leave a hole");
    }
    expected = end;
  }
  if (expected != size - payload) {
    throw InputError(std::to_string(size - payload - expected) + " bytes follow the last tensor");
  }
  return begins;
}

MappedShard::MappedShard(const std::string& path, const std::vector<TensorLayout>& layout) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw InputError(path + ": cannot be opened (" + std::strerror(errno) + ")");
  struct stat status{};
  void* mapped = MAP_FAILED;
  if (fstat(descriptor, &status) == 0 && status.st_size > 0) {
    size_ = static_cast<uint64_t>(status.st_size);
    mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
  }
  const int reason = errno;
  close(descriptor);  // the mapping needs none: a store may have more shards than a process may have open files
  if (mapped == MAP_FAILED) {
    throw InputError(path + (size_ == 0 ? ": empty, not a shard, or truncated"
                                        : std::string(": cannot be mapped (") + std::strerror(reason) + ")"));
  }
  file_ = static_cast<const uint8_t*>(mapped);
  try {
    offsets_ = parse_shard(file_, size_, layout);
  } catch (const InputError& error) {
    munmap(mapped, size_);
    throw InputError(path + ": " + error.what());
  }
}

void MappedShard::unload() const { madvise(const_cast<uint8_t*>(file_), size_, MADV_DONTNEED); }

MappedShard::~MappedShard() { munmap(const_cast<uint8_t*>(file_), size_); }

}  // namespace pyard::trajectory
