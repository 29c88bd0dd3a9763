#include "prompt.h"

#include <algorithm>

#include "fault.h"
#include "json.h"

namespace pocketvlm {
namespace {

const std::string kStart = "\xF3\xB0\x80\x80", kEnd = "\xF3\xB0\x80\x81";
const std::string kAnswer = "\xF3\xB0\x80\x82";

bool is_at(const std::string& text, std::size_t at, const std::string& word) {
  return text.compare(at, word.size(), word) == 0;
}

// The text with every occurrence of a word replaced by what a function returns for it in turn.
template <typename Next>
std::string replaced(const std::string& text, const std::string& word, Next next) {
  std::string result;
  std::size_t done = 0;
  for (auto at = text.find(word); at != std::string::npos; at = text.find(word, at + word.size())) {
    // A marked word was written by the user, and is not the template's.
    if (at >= kStart.size() && is_at(text, at - kStart.size(), kStart)) continue;
    result += text.substr(done, at - done) + next();
    done = at + word.size();
  }
  return result + text.substr(done);
}

std::string named_token(const Json& config, const char* name) {
  const auto found = config.find(name);
  if (found == config.end()) return "";
  if (found->is_object()) return found->value("content", "");
  return found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

PromptCodec PromptCodec::from_bundle(const Bundle& bundle) {
  PromptCodec codec(Tokenizer::open(bundle.path / "tokenizer.json"), bundle);
  const std::string& token = bundle.prompt.image_token;
  if (codec.tokenizer_.id_of(token) != bundle.prompt.image_token_id) {
    throw Fault(bundle.path.string() + ": tokenizer.json has " + token + " at " +
                std::to_string(codec.tokenizer_.id_of(token)) + ", the manifest at " +
                std::to_string(bundle.prompt.image_token_id));
  }
  const auto file = bundle.path / "tokenizer_config.json";
  if (std::filesystem::exists(file)) {
    const Json config = read_json(file);
    codec.first_token_ = reading(file, [&] { return named_token(config, "bos_token"); });
  }
  return codec;
}

TokenIds PromptCodec::encode(const std::string& rendered, const std::vector<PicturePlace>& pictures,
                             const std::vector<std::string>& answers) const {
  std::size_t places = 0, said = 0;
  std::string text = replaced(rendered, prompt_.image_mark.value_or(prompt_.image_token), [&] {
    return ++places <= pictures.size() ? picture_text(pictures[places - 1]) : std::string();
  });
  if (places != pictures.size()) {
    throw Fault("the rendered text has places for " + std::to_string(places) +
                " pictures where " + std::to_string(pictures.size()) + " are shown");
  }
  text = replaced(text, kAnswer, [&] {
    return ++said <= answers.size() ? marked(answers[said - 1]) : std::string();
  });
  if (said != answers.size()) {
    throw Fault("the rendered text has places for " + std::to_string(said) +
                " earlier answers where there are " + std::to_string(answers.size()));
  }
  // A template that writes the first token itself writes all of them; a prefix has its own.
  const bool has_first = !first_token_.empty() && is_at(rendered, 0, first_token_);
  const TokenIds ids = encode_marked(text, prompt_.is_prefix || !has_first);
  if (ids.empty()) throw Fault("the rendered text has no tokens");
  for (const std::int64_t id : ids) {
    if (prompt_.embedding_rows && id >= *prompt_.embedding_rows && id != prompt_.image_token_id) {
      throw Fault("the prompt holds token " + std::to_string(id) +
                  ", but the model's embedding table ends at " +
                  std::to_string(*prompt_.embedding_rows - 1));
    }
  }
  return ids;
}

std::string PromptCodec::picture_text(const PicturePlace& picture) const {
  const TileGrid& grid = picture.grid;
  std::string visual, tile;
  for (std::int64_t i = 0; i < picture.placeholders; ++i) tile += prompt_.image_token;
  if (!prompt_.tile_marker || !grid.is_split()) {
    for (int i = 0; i < grid.all_tiles(); ++i) visual += tile;
    return prompt_.image_prefix + visual + prompt_.image_suffix;
  }
  const std::string whole = prompt_.image_prefix + tile + prompt_.image_suffix;
  std::string lines;
  for (int row = 1; row <= grid.rows; ++row) {
    for (int column = 1; column <= grid.columns; ++column) {
      std::string marker = *prompt_.tile_marker;
      for (const auto& [name, number] : {std::pair<std::string, int>{"{row}", row}, {"{column}", column}}) {
        for (auto at = marker.find(name); at != std::string::npos; at = marker.find(name, at + 1)) {
          marker.replace(at, name.size(), std::to_string(number));
        }
      }
      lines += marker + tile;
    }
    if (!prompt_.whole_marker) lines += "\n";
  }
  if (!prompt_.whole_marker) return lines + "\n" + whole;
  return prompt_.image_prefix + lines + *prompt_.whole_marker + tile + prompt_.image_suffix;
}

// An answer whose words that look like control tokens are marked as text.
std::string PromptCodec::marked(const std::string& answer) const {
  std::string result;
  for (std::size_t at = 0; at < answer.size();) {
    if (is_at(answer, at, kStart) || is_at(answer, at, kEnd)) {
      at += kStart.size();
      continue;
    }
    const std::string token(tokenizer_.added_at(std::string_view(answer).substr(at)));
    if (!token.empty() && (tokenizer_.is_special(token) || token == prompt_.image_token)) {
      result += kStart + token + kEnd;
      at += token.size();
    } else {
      result += answer[at++];
    }
  }
  return result;
}

TokenIds PromptCodec::encode_marked(const std::string& text, bool adds_tokens) const {
  TokenIds ids;
  const auto add = [&](const TokenIds& more) { ids.insert(ids.end(), more.begin(), more.end()); };
  if (adds_tokens) add(tokenizer_.prefix());
  bool is_first = true;
  std::string piece;
  const auto end_piece = [&] {
    if (is_first) {
      add(tokenizer_.encode(piece));
    } else if (!piece.empty()) {
      add(encode_inside(piece, false));
    }
    is_first = false;
    piece.clear();
  };
  for (std::size_t at = 0; at < text.size();) {
    if (is_at(text, at, kStart)) {
      const auto first = at + kStart.size(), last = text.find(kEnd, first);
      end_piece();
      at = first;
      if (last == std::string::npos) continue;
      const std::string word = text.substr(first, last - first);
      if (tokenizer_.id_of(word) < 0) continue;
      const TokenIds found = encode_inside(word, true);
      if (std::count(found.begin(), found.end(), tokenizer_.id_of(word)) != 0) {
        throw Fault(word + " cannot be read as plain text: the tokenizer turns its letters into " +
                    "the control token");
      }
      add(found);
      at = last + kEnd.size();
    } else if (is_at(text, at, kEnd)) {
      end_piece();
      at += kEnd.size();
    } else {
      piece += text[at++];
    }
  }
  end_piece();
  if (adds_tokens) add(tokenizer_.suffix());
  return ids;
}

// Ids of text inside a prompt, without what a tokenizer does at the start of a text.
TokenIds PromptCodec::encode_inside(const std::string& text, bool is_plain) const {
  const auto encode = [&](const std::string& part) {
    return is_plain ? tokenizer_.encode_plain(part) : tokenizer_.encode(part);
  };
  const TokenIds newline = tokenizer_.encode("\n");
  const TokenIds ids = encode("\n" + text);
  if (ids.size() >= newline.size() && std::equal(newline.begin(), newline.end(), ids.begin())) {
    return TokenIds(ids.begin() + static_cast<std::ptrdiff_t>(newline.size()), ids.end());
  }
  return encode(text);
}

}  // namespace pocketvlm
