#include "trajectory/json.h"

#include <algorithm>

namespace pyard::trajectory {
namespace {

// A header nests three deep; metadata may a little more.
constexpr int kMaxDepth = 16;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  JsonValue parse() {
    JsonValue value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* reason) const {
    throw InputError("not valid JSON (" + std::string(reason) + " at byte " + std::to_string(at_) + ")");
  }

  bool ended() const { return at_ == text_.size(); }
  char peek() const { return ended() ? '\0' : text_[at_]; }

  char next() {
    if (ended()) fail("text ends early");
    return text_[at_++];
  }

  void expect(char c) {
    if (next() != c) {
      --at_;
      fail("an unexpected character");
    }
  }

  bool take(char c) {
    if (ended() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void skip_space() {
    while (!ended() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
  }

  JsonValue parse_value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    skip_space();
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"': {
        JsonValue value;
        value.kind = JsonValue::Kind::kString;
        value.text = parse_string();
        return value;
      }
      case 't':
        return parse_word("true", JsonValue::Kind::kBoolean);
      case 'f':
        return parse_word("false", JsonValue::Kind::kBoolean);
      case 'n':
        return parse_word("null", JsonValue::Kind::kNull);
      default:
        return parse_number();
    }
  }

  JsonValue parse_object(int depth) {
    JsonValue value;
    value.kind = JsonValue::Kind::kObject;
    expect('{');
    skip_space();
    if (take('}')) return value;
    do {
      skip_space();
      std::string key = parse_string();
      if (value.find(key) != nullptr) fail("a key appears twice");
      skip_space();
      expect(':');
      value.members.emplace_back(std::move(key), parse_value(depth + 1));
      skip_space();
    } while (take(','));
    expect('}');
    return value;
  }

  JsonValue parse_array(int depth) {
    JsonValue value;
    value.kind = JsonValue::Kind::kArray;
    expect('[');
    skip_space();
    if (take(']')) return value;
    do {
      value.items.push_back(parse_value(depth + 1));
      skip_space();
    } while (take(','));
    expect(']');
    return value;
  }

  JsonValue parse_word(std::string_view word, JsonValue::Kind kind) {
    for (char c : word) expect(c);
    JsonValue value;
    value.kind = kind;
    return value;
  }

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  void skip_digits() {
    if (!is_digit(peek())) fail("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  JsonValue parse_number() {
    JsonValue value;
    value.kind = JsonValue::Kind::kWhole;
    if (take('-')) value.kind = JsonValue::Kind::kNumber;
    const size_t begin = at_;
    skip_digits();
    const std::string_view digits = text_.substr(begin, at_ - begin);
    if (digits.size() > 1 && digits[0] == '0') fail("a number with a leading zero");
    for (char c : digits) {
      const uint64_t digit = static_cast<uint64_t>(c - '0');
      if (value.whole > (UINT64_MAX - digit) / 10) value.kind = JsonValue::Kind::kNumber;
      if (value.kind == JsonValue::Kind::kNumber) break;
      value.whole = value.whole * 10 + digit;
    }
    if (take('.')) {
      skip_digits();
      value.kind = JsonValue::Kind::kNumber;
    }
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      skip_digits();
      value.kind = JsonValue::Kind::kNumber;
    }
    return value;
  }

  std::string parse_string() {
    expect('"');
    std::string result;
    while (true) {
      const char c = next();
      if (c == '"') return result;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        result += c;
        continue;
      }
      switch (const char escaped = next()) {
        case '"':
        case '\\':
        case '/':
          result += escaped;
          break;
        case 'b':
          result += '\b';
          break;
        case 'f':
          result += '\f';
          break;
        case 'n':
          result += '\n';
          break;
        case 'r':
          result += '\r';
          break;
        case 't':
          result += '\t';
          break;
        case 'u':
          append_utf8(result, parse_code_point());
          break;
        default:
          fail("an unknown escape");
      }
    }
  }

  uint32_t parse_code_point() {
    const uint32_t high = parse_hex4();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF) fail("a lone surrogate");
    expect('\\');
    expect('u');
    const uint32_t low = parse_hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a lone surrogate");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  uint32_t parse_hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const uint32_t digit = is_digit(c)              ? static_cast<uint32_t>(c - '0')
                             : (c >= 'a' && c <= 'f') ? static_cast<uint32_t>(c - 'a' + 10)
                             : (c >= 'A' && c <= 'F') ? static_cast<uint32_t>(c - 'A' + 10)
                                                      : 16;
      if (digit == 16) fail("expected four hexadecimal digits");
      value = value * 16 + digit;
    }
    return value;
  }

  static void append_utf8(std::string& to, uint32_t point) {
    const auto put = [&to](uint32_t byte) { to += static_cast<char>(byte); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xC0 | point >> 6);
      put(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      put(0xE0 | point >> 12);
      put(0x80 | (point >> 6 & 0x3F));
      put(0x80 | (point & 0x3F));
    } else {
      put(0xF0 | point >> 18);
      put(0x80 | (point >> 12 & 0x3F));
      put(0x80 | (point >> 6 & 0x3F));
      put(0x80 | (point & 0x3F));
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

// Table 3-7 of the Unicode standard: shortest forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u; };
    const auto follows = [&](size_t k) { return (byte(k) & 0xC0) == 0x80; };
    const unsigned first = byte(0), second = byte(1);
    if (first < 0x80) {
      i += 1;
    } else if (first >= 0xC2 && first <= 0xDF && follows(1)) {
      i += 2;
    } else if ((first & 0xF0) == 0xE0 && follows(1) && follows(2) && !(first == 0xE0 && second < 0xA0) &&
               !(first == 0xED && second > 0x9F)) {
      i += 3;
    } else if (first >= 0xF0 && first <= 0xF4 && follows(1) && follows(2) && follows(3) &&
               !(first == 0xF0 && second < 0x90) && !(first == 0xF4 && second > 0x8F)) {
      i += 4;
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

const JsonValue* JsonValue::find(std::string_view key) const {
  const auto found = std::find_if(members.begin(), members.end(), [key](const auto& m) { return m.first == key; });
  return found == members.end() ? nullptr : &found->second;
}

JsonValue parse_json(std::string_view text) {
  if (!is_utf8(text)) throw InputError("not valid JSON (not UTF-8)");
  return Parser(text).parse();
}

}  // namespace pyard::trajectory
