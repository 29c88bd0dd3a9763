// Rendered conversations to token ids, as the Python runtime's `PromptCodec` makes them.
//
// A rendered text has one mark per picture, U+F0002 for every earlier answer, and words that must
// not be read as control tokens between U+F0000 and U+F0001.
#pragma once

#include <string>
#include <vector>

#include "bundle.h"
#include "tiles.h"
#include "tokenizer.h"

namespace pocketvlm {

// What a picture takes of a prompt: so many placeholders for each of its tiles.
struct PicturePlace {
  TileGrid grid;
  std::int64_t placeholders;
};

class PromptCodec {
 public:
  static PromptCodec from_bundle(const Bundle& bundle);

  // Token ids of a conversation; throws Fault if pictures or answers and their marks do not match.
  TokenIds encode(const std::string& rendered, const std::vector<PicturePlace>& pictures,
                  const std::vector<std::string>& answers) const;

  const Tokenizer& tokenizer() const { return tokenizer_; }

 private:
  PromptCodec(Tokenizer tokenizer, const Bundle& bundle)
      : tokenizer_(std::move(tokenizer)), prompt_(bundle.prompt) {}

  std::string picture_text(const PicturePlace& picture) const;
  std::string marked(const std::string& answer) const;
  TokenIds encode_marked(const std::string& text, bool adds_tokens) const;
  TokenIds encode_inside(const std::string& text, bool is_plain) const;

  Tokenizer tokenizer_;
  PromptSettings prompt_;
  std::string first_token_;  // the template's bos_token; empty if there is none
};

}  // namespace pocketvlm
