// Token ids in, pieces of text out, never half a character.
#pragma once

#include <string>

#include "tokenizer.h"

namespace pocketvlm {

// The pieces put together are the decoded answer without white space at its ends. A token may end
// inside a character, and white space may be the answer's end: both are held back.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // Takes one token; returns what is certain now.
  std::string push(std::int64_t token);

  // Ends the answer; returns what was held back.
  std::string finish();

  const std::string& text() const { return text_; }

 private:
  std::string decode(std::size_t first, std::size_t last) const;
  std::string emit(const std::string& piece);

  const Tokenizer& tokenizer_;
  TokenIds tokens_;
  std::string text_, held_;
  // A window of the last tokens is decoded; it starts one piece early.
  std::size_t window_ = 0, done_ = 0;
};

}  // namespace pocketvlm
