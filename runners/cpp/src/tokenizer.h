// Byte-level BPE as tokenizer.json describes it: text to token ids and back.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "splitting.h"

namespace pocketvlm {

using TokenIds = std::vector<std::int64_t>;

class Tokenizer {
 public:
  // Throws Fault with the name of a part that is not known.
  static Tokenizer open(const std::filesystem::path& file);

  // Ids of a text in which added tokens are read as such.
  TokenIds encode(const std::string& text) const;

  // Ids of a text in which nothing is an added token.
  TokenIds encode_plain(const std::string& text) const;

  // What stands before and after the ids of a whole text.
  const TokenIds& prefix() const { return prefix_; }
  const TokenIds& suffix() const { return suffix_; }

  // Text of tokens, special ones left out.
  std::string decode(const std::int64_t* first, const std::int64_t* last) const;

  // The id of a token, or -1.
  std::int64_t id_of(const std::string& token) const;

  // The added token at the start of a text, the longest; empty if none is there.
  std::string_view added_at(std::string_view text) const;

  bool is_special(const std::string& token) const;

 private:
  struct Added {
    std::int64_t id;
    bool is_special;
  };

  void read_added(const nlohmann::json& documents);
  void read_model(const nlohmann::json& model);
  void read_post_processor(const nlohmann::json& document);
  void encode_word(const std::string& bytes, TokenIds& ids) const;

  bool needs_form_c_ = false;
  bool ignores_merges_ = false;
  std::vector<Splitter> splitters_;
  std::unordered_map<std::string, std::int64_t> vocabulary_;  // words as bytes
  std::unordered_map<std::int64_t, std::string> words_;       // likewise, added tokens left out
  std::array<std::int64_t, 256> bytes_{};                     // ids of single bytes, -1 for none
  struct Merge {
    std::int32_t rank;
    std::int64_t id;
  };
  std::unordered_map<std::uint64_t, Merge> merges_;  // by both ids
  std::unordered_map<std::string, Added> added_;
  std::unordered_map<std::int64_t, std::string> added_words_;
  std::array<std::size_t, 256> longest_added_{};  // bytes of the longest one by its first byte
  TokenIds prefix_, suffix_;
};

}  // namespace pocketvlm
