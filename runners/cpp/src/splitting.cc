#include "splitting.h"

#include <algorithm>
#include <array>

#include "fault.h"
#include "json.h"

namespace pocketvlm {
namespace {

// The published patterns differ in these points alone.
struct Words {
  bool any_case;       // 'S is cut off like 's
  bool takes_sign;     // a letter run may begin with any one sign, not with a space alone
  bool spaces_digits;  // a digit run may begin with a space
  std::size_t digits;  // the longest run of digits
  bool takes_breaks;   // signs take line breaks after them, and white space ends after a break
};

constexpr std::size_t kAny = static_cast<std::size_t>(-1);
constexpr Words kGpt2{false, false, true, kAny, false};

struct Pattern {
  const char* text;
  Words words;
};

const Pattern kPatterns[] = {
    {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
     "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
     {true, true, false, 1, true}},
    {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
     "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
     {true, true, false, 3, true}},
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", kGpt2},
};

bool is_break(char32_t code) { return code == '\r' || code == '\n'; }

bool is_sign(char32_t code) { return !is_space(code) && !is_letter(code) && !is_number(code); }

template <typename Test>
std::size_t run_end(const Codes& text, std::size_t from, std::size_t end, Test test) {
  while (from < end && test(text[from])) ++from;
  return from;
}

// The end of 's, 't, 're, 've, 'm, 'll or 'd at `at`; `at` if there is none.
std::size_t contraction_end(const Codes& text, std::size_t at, std::size_t end, bool any_case) {
  static constexpr std::array<const char*, 7> kEndings = {"s", "t", "re", "ve", "m", "ll", "d"};
  if (text[at] != '\'') return at;
  for (const char* ending : kEndings) {
    std::size_t next = at + 1;
    const char* letter = ending;
    for (; *letter != 0 && next < end; ++letter, ++next) {
      char32_t code = text[next];
      if (any_case && 'A' <= code && code <= 'Z') code += 'a' - 'A';
      if (any_case && code == 0x17F) code = 's';  // the long s folds to s
      if (code != static_cast<char32_t>(*letter)) break;
    }
    if (*letter == 0) return next;
  }
  return at;
}

std::size_t space_end(const Codes& text, std::size_t at, std::size_t end, const Words& words) {
  const std::size_t last = run_end(text, at, end, is_space);
  if (words.takes_breaks) {
    for (std::size_t place = last; place > at; --place) {
      if (is_break(text[place - 1])) return place;
    }
  }
  // White space before a word leaves it its last character.
  return last < end && last - at > 1 ? last - 1 : last;
}

// Where the word at `at` ends: the alternatives of the patterns in their order.
std::size_t word_end(const Codes& text, std::size_t at, std::size_t end, const Words& words) {
  const std::size_t contraction = contraction_end(text, at, end, words.any_case);
  if (contraction > at) return contraction;
  const char32_t first = text[at];
  const std::size_t spaced = at + (first == ' ' ? 1 : 0);
  std::size_t letters = spaced;
  if (words.takes_sign) {
    letters = at + (!is_break(first) && !is_letter(first) && !is_number(first) ? 1 : 0);
  }
  if (letters < end && is_letter(text[letters])) return run_end(text, letters, end, is_letter);
  const std::size_t digits = words.spaces_digits ? spaced : at;
  if (digits < end && is_number(text[digits])) {
    const std::size_t most = words.digits < end - digits ? digits + words.digits : end;
    return run_end(text, digits, most, is_number);
  }
  if (spaced < end && is_sign(text[spaced])) {
    const std::size_t signs = run_end(text, spaced, end, is_sign);
    return words.takes_breaks ? run_end(text, signs, end, is_break) : signs;
  }
  return space_end(text, at, end, words);
}

Splitter by_words(const Words& words) {
  return [words](const Codes& text, Span part) {
    std::vector<Span> spans;
    for (std::size_t at = part.first; at < part.end;) {
      const std::size_t next = word_end(text, at, part.end, words);
      spans.push_back({at, next});
      at = next;
    }
    return spans;
  };
}

std::vector<Span> by_digit(const Codes& text, Span part) {
  std::vector<Span> spans;
  for (std::size_t at = part.first; at < part.end;) {
    std::size_t next = at + 1;
    if (!is_number(text[at])) {
      next = run_end(text, at, part.end, [](char32_t code) { return !is_number(code); });
    }
    spans.push_back({at, next});
    at = next;
  }
  return spans;
}

Splitter read_pattern(const Json& document) {
  const std::string pattern = document.at("pattern").at("Regex");
  if (document.at("behavior") == "Isolated" && !document.value("invert", false)) {
    for (const Pattern& known : kPatterns) {
      if (pattern == known.text) return by_words(known.words);
    }
  }
  throw Fault("pre_tokenizer Split with the pattern " + pattern + " is not known to this runner");
}

void add_splitters(const Json& document, std::vector<Splitter>& steps, bool& is_byte_level) {
  const std::string kind = document.at("type");
  if (kind == "Sequence") {
    for (const Json& step : document.at("pretokenizers")) {
      add_splitters(step, steps, is_byte_level);
    }
  } else if (is_byte_level) {
    throw Fault("pre_tokenizer " + kind + " after ByteLevel is not known to this runner");
  } else if (kind == "ByteLevel") {
    if (document.value("add_prefix_space", true)) {
      throw Fault("pre_tokenizer ByteLevel with add_prefix_space is not known to this runner");
    }
    if (document.value("use_regex", true)) steps.push_back(by_words(kGpt2));
    is_byte_level = true;
  } else if (kind == "Digits" && document.value("individual_digits", false)) {
    steps.emplace_back(by_digit);
  } else if (kind == "Split" && document.at("pattern").contains("Regex")) {
    steps.push_back(read_pattern(document));
  } else {
    throw Fault("pre_tokenizer " + kind + " is not known to this runner");
  }
}

}  // namespace

std::vector<Splitter> read_splitters(const Json& pre_tokenizer) {
  std::vector<Splitter> steps;
  bool is_byte_level = false;
  if (pre_tokenizer.is_object()) add_splitters(pre_tokenizer, steps, is_byte_level);
  if (!is_byte_level) throw Fault("a tokenizer that is not byte-level is not known to this runner");
  return steps;
}

}  // namespace pocketvlm
