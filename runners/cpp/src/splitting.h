// Pre-tokenizers: how a text is cut before pairs are merged.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "text.h"

namespace pocketvlm {

// A part of a text, [first, end).
struct Span {
  std::size_t first, end;
};

// One step; it cuts a part of the text into further parts.
using Splitter = std::function<std::vector<Span>(const Codes& text, Span part)>;

// The steps of a tokenizer.json's `pre_tokenizer`; throws Fault with the name of one that is not
// known. All of them end in byte-level characters.
std::vector<Splitter> read_splitters(const nlohmann::json& pre_tokenizer);

}  // namespace pocketvlm
