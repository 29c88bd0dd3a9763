#include "text.h"

#include <algorithm>
#include <iterator>

#include "fault.h"

namespace pocketvlm {
namespace {

struct Range {
  char32_t first, last;
  int value;
};

#include "unicode_tables.inc"

template <std::size_t N>
int look_up(const Range (&table)[N], char32_t code) {
  const Range* found = std::upper_bound(
      std::begin(table), std::end(table), code,
      [](char32_t wanted, const Range& range) { return wanted < range.first; });
  if (found == std::begin(table)) return 0;
  --found;
  return code <= found->last ? found->value : 0;
}

constexpr char32_t kReplacement = 0xFFFD;

// The code point at the front, and its bytes; what is no UTF-8 gives kReplacement, `is_valid`
// false, and the bytes that were the start of a character, at least one.
struct Read {
  char32_t code;
  std::size_t bytes;
  bool is_valid;
};

Read read_code(std::string_view text) {
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(text[at]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  if (lead < 0xC2 || lead > 0xF4) return {kReplacement, 1, false};
  const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code = lead & (0x7Fu >> size);
  for (std::size_t at = 1; at < size; ++at) {
    // Only the second byte may be bounded further: no overlong forms, no surrogates.
    unsigned low = 0x80, high = 0xBF;
    if (at == 1 && lead == 0xE0) low = 0xA0;
    if (at == 1 && lead == 0xED) high = 0x9F;
    if (at == 1 && lead == 0xF0) low = 0x90;
    if (at == 1 && lead == 0xF4) high = 0x8F;
    if (at >= text.size() || byte(at) < low || byte(at) > high) return {kReplacement, at, false};
    code = code << 6 | (byte(at) & 0x3Fu);
  }
  return {code, size, true};
}

}  // namespace

Codes decode_utf8(std::string_view text) {
  Codes codes;
  codes.reserve(text.size());
  while (!text.empty()) {
    const Read read = read_code(text);
    if (!read.is_valid) throw Fault("the text is not valid UTF-8");
    codes.push_back(read.code);
    text.remove_prefix(read.bytes);
  }
  return codes;
}

void append_utf8(std::string& text, char32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int following = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr unsigned kLeads[] = {0, 0xC0, 0xE0, 0xF0};
  text += static_cast<char>(kLeads[following] | code >> (6 * following));
  for (int shift = 6 * (following - 1); shift >= 0; shift -= 6) {
    text += static_cast<char>(0x80u | (code >> shift & 0x3Fu));
  }
}

std::string decode_lossy(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const Read read = read_code(bytes);
    append_utf8(text, read.code);
    bytes.remove_prefix(read.bytes);
  }
  return text;
}

bool is_letter(char32_t code) { return look_up(kLetters, code) != 0; }

bool is_number(char32_t code) { return look_up(kNumbers, code) != 0; }

bool is_space(char32_t code) {
  return (9 <= code && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (0x2000 <= code && code <= 0x200A) || code == 0x2028 ||
         code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

bool is_normal_form_c(const Codes& text) {
  int last = 0;
  for (const char32_t code : text) {
    const int combining = look_up(kCombining, code);
    if ((combining != 0 && combining < last) || look_up(kChangedByC, code) != 0) return false;
    last = combining;
  }
  return true;
}

std::string strip(const std::string& text) {
  // Python's str.strip also takes these four separators for white space.
  const auto is_stripped = [](char32_t code) {
    return is_space(code) || (0x1C <= code && code <= 0x1F);
  };
  const Codes codes = decode_utf8(text);
  const auto first = std::find_if_not(codes.begin(), codes.end(), is_stripped);
  const auto last = std::find_if_not(codes.rbegin(), std::make_reverse_iterator(first), is_stripped);
  std::string result;
  for (auto code = first; code != last.base(); ++code) append_utf8(result, *code);
  return result;
}

}  // namespace pocketvlm
