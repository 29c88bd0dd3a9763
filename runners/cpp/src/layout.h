// Where every row of the decoder's input comes from, and which rotary position it has.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "tokenizer.h"

namespace pocketvlm {

// The rows that stand for one run of placeholders: a picture, or one tile of it.
struct VisualRows {
  std::vector<float> embeds;          // [kept, width]
  std::vector<std::int64_t> indices;  // [kept]: which of the unreduced tokens these are
  std::int64_t placeholders;          // length of the run
  std::optional<PositionGrid> grid;   // of the unreduced tokens, where positions have three axes
  std::int64_t serial;                // tells this run from every other of the process
};

// The rows of a prompt, in order.
struct Layout {
  std::vector<std::int64_t> codes;  // the token of a text row, -1 - serial of a visual one
  std::vector<std::int64_t> slots;  // which of its run's rows a visual row takes
  std::vector<std::vector<std::int64_t>> positions;  // by axis
  std::int64_t next_position = 0;

  std::int64_t rows() const { return static_cast<std::int64_t>(codes.size()); }
  bool is_visual(std::int64_t row) const { return codes[row] < 0; }

  // Numbers of rows that see each other, -1 for the others.
  std::vector<std::int64_t> mutual(const std::optional<std::string>& kind) const;

  // Rows at the start that both layouts have in common.
  std::int64_t shared_rows(const Layout& other) const;

  // With generated tokens after it, cut to a number of rows.
  Layout extended(const TokenIds& tokens, std::int64_t rows) const;
};

// Lays out a prompt whose pictures are runs of all their placeholders; throws Fault where these do
// not match.
Layout lay_out(const TokenIds& tokens, const std::vector<const VisualRows*>& pictures,
               const Bundle& bundle);

}  // namespace pocketvlm
