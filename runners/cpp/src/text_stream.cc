#include "text_stream.h"

#include "text.h"

namespace pocketvlm {
namespace {

const std::string kReplacementText = "\xEF\xBF\xBD";

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() &&
         text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

}  // namespace

std::string TextStream::push(std::int64_t token) {
  tokens_.push_back(token);
  const std::string before = decode(window_, done_), after = decode(window_, tokens_.size());
  if (after.size() <= before.size() || ends_with(after, kReplacementText)) return "";
  window_ = done_;
  done_ = tokens_.size();
  return emit(after.substr(before.size()));
}

std::string TextStream::finish() {
  const std::string before = decode(window_, done_), after = decode(window_, tokens_.size());
  done_ = tokens_.size();
  std::string piece = emit(after.size() > before.size() ? after.substr(before.size()) : "");
  held_.clear();
  return piece;
}

std::string TextStream::decode(std::size_t first, std::size_t last) const {
  return tokenizer_.decode(tokens_.data() + first, tokens_.data() + last);
}

std::string TextStream::emit(const std::string& piece) {
  std::string pending = held_ + piece;
  const std::string bare = strip(pending);
  const auto start = bare.empty() ? pending.size() : pending.find(bare);
  if (text_.empty()) pending = pending.substr(start);
  const auto end = bare.empty() ? 0 : pending.find(bare) + bare.size();
  held_ = pending.substr(end);
  const std::string certain = pending.substr(0, end);
  text_ += certain;
  return certain;
}

}  // namespace pocketvlm
