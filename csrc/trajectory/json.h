// A JSON reader for the headers of untrusted safetensors files: bounded depth, unique keys, and no numbers kept but the
// whole ones that offsets and shapes are made of.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pyard::trajectory {

// What is wrong with a file or a request, in words for the user.
class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct JsonValue {
  enum class Kind { kNull, kBoolean, kWhole, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  uint64_t whole = 0;  // kWhole: digits alone, at most 2^64 - 1; every other number is kNumber, its value dropped
  std::string text;    // kString, decoded to UTF-8
  std::vector<JsonValue> items;                            // kArray
  std::vector<std::pair<std::string, JsonValue>> members;  // kObject, in the order of the text, keys unique

  // The member of an object, null if it has none of that name or is no object.
  const JsonValue* find(std::string_view key) const;
};

// Throws InputError if `text` is anything but one JSON value.
JsonValue parse_json(std::string_view text);

}  // namespace pyard::trajectory
