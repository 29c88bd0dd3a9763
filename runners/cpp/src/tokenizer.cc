#include "tokenizer.h"

#include <algorithm>
#include <queue>
#include <tuple>

#include "fault.h"
#include "json.h"
#include "text.h"

namespace pocketvlm {
namespace {

// Byte-level vocabularies write every byte as a printable character: bytes that are printable
// stand for themselves, the others follow from U+0100 on.
std::array<char32_t, 256> byte_characters() {
  std::array<char32_t, 256> characters{};
  char32_t next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool is_printable =
        (0x21 <= byte && byte <= 0x7E) || (0xA1 <= byte && byte <= 0xAC) || byte >= 0xAE;
    characters[byte] = is_printable ? byte : next++;
  }
  return characters;
}

// The bytes that a word of the vocabulary stands for; false if it is not byte-level.
bool to_bytes(const std::string& word, std::string& bytes) {
  static const auto kBytes = [] {
    std::unordered_map<char32_t, char> map;
    const auto characters = byte_characters();
    for (unsigned byte = 0; byte < 256; ++byte) map[characters[byte]] = static_cast<char>(byte);
    return map;
  }();
  bytes.clear();
  for (const char32_t code : decode_utf8(word)) {
    const auto found = kBytes.find(code);
    if (found == kBytes.end()) return false;
    bytes += found->second;
  }
  return true;
}

std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

std::string utf8(const Codes& text, Span span) {
  std::string bytes;
  for (std::size_t at = span.first; at < span.end; ++at) append_utf8(bytes, text[at]);
  return bytes;
}

bool is_stated(const Json& document, const char* name) {
  const auto found = document.find(name);
  return found != document.end() && !found->is_null() && *found != "" && *found != false;
}

}  // namespace

Tokenizer Tokenizer::open(const std::filesystem::path& file) {
  const Json document = read_json(file);
  return reading(file, [&] {
    Tokenizer tokenizer;
    const Json& normalizer = document.at("normalizer");
    if (!normalizer.is_null()) {
      const std::string kind = normalizer.at("type");
      if (kind != "NFC") throw Fault("normalizer " + kind + " is not known to this runner");
      tokenizer.needs_form_c_ = true;
    }
    const Json& decoder = document.at("decoder");
    if (!decoder.is_object() || decoder.at("type") != "ByteLevel") {
      throw Fault("a decoder other than ByteLevel is not known to this runner");
    }
    tokenizer.splitters_ = read_splitters(document.at("pre_tokenizer"));
    tokenizer.read_model(document.at("model"));
    tokenizer.read_added(document.at("added_tokens"));
    tokenizer.read_post_processor(document.at("post_processor"));
    return tokenizer;
  });
}

void Tokenizer::read_model(const Json& model) {
  if (model.value("type", "BPE") != "BPE") {
    throw Fault("model " + model.at("type").get<std::string>() + " is not known to this runner");
  }
  for (const char* name :
       {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
    if (is_stated(model, name)) throw Fault(std::string(name) + " is not known to this runner");
  }
  ignores_merges_ = model.value("ignore_merges", false);
  bytes_.fill(-1);
  std::string bytes;
  for (const auto& [word, id] : model.at("vocab").items()) {
    if (!to_bytes(word, bytes)) continue;  // an added token
    vocabulary_[bytes] = id;
    words_[id.get<std::int64_t>()] = bytes;
    if (bytes.size() == 1) bytes_[static_cast<unsigned char>(bytes[0])] = id;
  }
  if (is_stated(model, "unk_token") &&
      std::find(bytes_.begin(), bytes_.end(), -1) != bytes_.end()) {
    throw Fault("unk_token beside a vocabulary without all bytes is not known to this runner");
  }
  std::int32_t rank = 0;
  std::string left, right;
  for (const Json& merge : model.at("merges")) {
    std::string first, second;
    if (merge.is_array()) {
      first = merge.at(0);
      second = merge.at(1);
    } else {
      const std::string both = merge;
      const auto space = both.find(' ');
      first = both.substr(0, space);
      second = space == std::string::npos ? "" : both.substr(space + 1);
    }
    const bool is_known = to_bytes(first, left) && to_bytes(second, right);
    const auto one = vocabulary_.find(left), other = vocabulary_.find(right);
    const auto made = vocabulary_.find(left + right);
    if (!is_known || one == vocabulary_.end() || other == vocabulary_.end() ||
        made == vocabulary_.end()) {
      throw Fault("merge " + std::to_string(rank) + " is of words that the vocabulary lacks");
    }
    merges_.emplace(pair_key(one->second, other->second), Merge{rank++, made->second});
  }
}

void Tokenizer::read_added(const Json& documents) {
  for (const Json& token : documents) {
    const std::string content = token.at("content");
    for (const char* name : {"single_word", "lstrip", "rstrip"}) {
      if (token.value(name, false)) {
        throw Fault("added token " + content + " with " + name + " is not known to this runner");
      }
    }
    if (content.empty()) continue;
    const std::int64_t id = token.at("id");
    added_[content] = {id, token.value("special", false)};
    added_words_[id] = content;
    auto& longest = longest_added_[static_cast<unsigned char>(content[0])];
    longest = std::max(longest, content.size());
  }
}

void Tokenizer::read_post_processor(const Json& document) {
  if (document.is_null()) return;
  const std::string kind = document.at("type");
  if (kind == "ByteLevel") return;  // moves offsets, not ids
  if (kind == "Sequence") {
    for (const Json& step : document.at("processors")) read_post_processor(step);
    return;
  }
  if (kind != "TemplateProcessing") {
    throw Fault("post_processor " + kind + " is not known to this runner");
  }
  TokenIds* side = &prefix_;
  for (const Json& part : document.at("single")) {
    if (part.contains("Sequence")) {
      side = &suffix_;
      continue;
    }
    const std::string name = part.at("SpecialToken").at("id");
    for (const Json& id : document.at("special_tokens").at(name).at("ids")) side->push_back(id);
  }
}

std::string_view Tokenizer::added_at(std::string_view text) const {
  if (text.empty()) return {};
  std::size_t size = std::min(text.size(), longest_added_[static_cast<unsigned char>(text[0])]);
  for (; size > 0; --size) {
    if (added_.count(std::string(text.substr(0, size))) != 0) return text.substr(0, size);
  }
  return {};
}

TokenIds Tokenizer::encode(const std::string& text) const {
  TokenIds ids;
  std::size_t start = 0;
  const auto add_plain = [&](std::size_t end) {
    const TokenIds plain = encode_plain(text.substr(start, end - start));
    ids.insert(ids.end(), plain.begin(), plain.end());
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view token = added_at(std::string_view(text).substr(at));
    if (token.empty()) {
      ++at;
      continue;
    }
    add_plain(at);
    ids.push_back(added_.at(std::string(token)).id);
    start = at += token.size();
  }
  add_plain(text.size());
  return ids;
}

TokenIds Tokenizer::encode_plain(const std::string& text) const {
  const Codes codes = decode_utf8(text);
  if (needs_form_c_ && !is_normal_form_c(codes)) {
    throw Fault("the tokenizer reads text in Unicode's normal form C, and this text may not be: "
                "normalize it first");
  }
  std::vector<Span> spans = {{0, codes.size()}};
  for (const Splitter& split : splitters_) {
    std::vector<Span> parts;
    for (const Span span : spans) {
      const std::vector<Span> found = split(codes, span);
      parts.insert(parts.end(), found.begin(), found.end());
    }
    spans = std::move(parts);
  }
  TokenIds ids;
  for (const Span span : spans) encode_word(utf8(codes, span), ids);
  return ids;
}

// Merges the pair of the lowest rank, the leftmost of equals, until none is left.
void Tokenizer::encode_word(const std::string& bytes, TokenIds& ids) const {
  if (ignores_merges_) {
    const auto whole = vocabulary_.find(bytes);
    if (whole != vocabulary_.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  struct Symbol {
    std::int64_t id;
    int before, after;
  };
  std::vector<Symbol> symbols;
  for (const char byte : bytes) {
    const std::int64_t id = bytes_[static_cast<unsigned char>(byte)];
    const int at = static_cast<int>(symbols.size());
    if (id >= 0) symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().after = -1;
  using Candidate = std::tuple<std::int32_t, int, std::int64_t, std::int64_t>;  // rank, place, ids
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int at) {
    if (at < 0 || symbols[at].after < 0) return;
    const std::int64_t left = symbols[at].id, right = symbols[symbols[at].after].id;
    const auto merge = merges_.find(pair_key(left, right));
    if (merge != merges_.end()) queue.emplace(merge->second.rank, at, left, right);
  };
  for (int at = 0; at < static_cast<int>(symbols.size()); ++at) consider(at);
  while (!queue.empty()) {
    const auto [rank, at, left, right] = queue.top();
    queue.pop();
    Symbol& symbol = symbols[at];
    // What was merged since is out of date; a swallowed symbol has the id -1.
    if (symbol.id != left || symbol.after < 0 || symbols[symbol.after].id != right) continue;
    Symbol& swallowed = symbols[symbol.after];
    symbol.id = merges_.at(pair_key(left, right)).id;
    symbol.after = swallowed.after;
    swallowed.id = -1;
    if (symbol.after >= 0) symbols[symbol.after].before = at;
    consider(symbol.before);
    consider(at);
  }
  for (int at = 0; at >= 0; at = symbols[at].after) ids.push_back(symbols[at].id);
}

std::string Tokenizer::decode(const std::int64_t* first, const std::int64_t* last) const {
  std::string bytes;
  for (; first != last; ++first) {
    const auto added = added_words_.find(*first);
    if (added != added_words_.end()) {
      if (added_.at(added->second).is_special) continue;
      std::string own;
      bytes += to_bytes(added->second, own) ? own : added->second;
      continue;
    }
    const auto word = words_.find(*first);
    if (word != words_.end()) bytes += word->second;
  }
  return decode_lossy(bytes);
}

std::int64_t Tokenizer::id_of(const std::string& token) const {
  const auto added = added_.find(token);
  return added == added_.end() ? -1 : added->second.id;
}

bool Tokenizer::is_special(const std::string& token) const {
  const auto added = added_.find(token);
  return added != added_.end() && added->second.is_special;
}

}  // namespace pocketvlm
