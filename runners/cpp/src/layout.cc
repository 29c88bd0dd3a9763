#include "layout.h"

#include <algorithm>

#include "fault.h"

namespace pocketvlm {
namespace {

void add_row(Layout& layout, std::int64_t code, std::int64_t slot,
             const std::vector<std::int64_t>& position) {
  layout.codes.push_back(code);
  layout.slots.push_back(slot);
  for (std::size_t axis = 0; axis < layout.positions.size(); ++axis) {
    layout.positions[axis].push_back(position[axis]);
  }
}

// Adds the rows of a run that starts at a position; returns the position after it.
std::int64_t add_picture(Layout& layout, const VisualRows& picture, std::int64_t start,
                         const Bundle& bundle) {
  const auto kept = static_cast<std::int64_t>(picture.indices.size());
  for (std::int64_t slot = 0; slot < kept; ++slot) {
    const std::int64_t index = picture.indices[slot];
    std::vector<std::int64_t> position = {start + (bundle.keeps_positions ? index : slot)};
    if (picture.grid) {
      const std::int64_t columns = picture.grid->columns;
      position = {start, start + index / columns, start + index % columns};
    }
    add_row(layout, -1 - picture.serial, slot, position);
  }
  if (picture.grid) return start + std::max(picture.grid->rows, picture.grid->columns);
  return start + (bundle.keeps_positions ? picture.placeholders : kept);
}

}  // namespace

std::vector<std::int64_t> Layout::mutual(const std::optional<std::string>& kind) const {
  std::vector<std::int64_t> numbers(codes.size(), kind == "prompt" ? 0 : -1);
  for (std::size_t row = 0; kind == "tile" && row < codes.size(); ++row) {
    if (codes[row] < 0) numbers[row] = -1 - codes[row];
  }
  return numbers;
}

std::int64_t Layout::shared_rows(const Layout& other) const {
  const std::int64_t most = std::min(rows(), other.rows());
  for (std::int64_t row = 0; row < most; ++row) {
    bool is_equal = codes[row] == other.codes[row] && slots[row] == other.slots[row];
    for (std::size_t axis = 0; axis < positions.size(); ++axis) {
      is_equal = is_equal && positions[axis][row] == other.positions[axis][row];
    }
    if (!is_equal) return row;
  }
  return most;
}

Layout Layout::extended(const TokenIds& tokens, std::int64_t rows) const {
  Layout longer = *this;
  for (const std::int64_t token : tokens) {
    add_row(longer, token, 0, std::vector<std::int64_t>(positions.size(), longer.next_position++));
  }
  const auto count = static_cast<std::size_t>(rows);
  longer.codes.resize(count);
  longer.slots.resize(count);
  for (auto& axis : longer.positions) axis.resize(count);
  return longer;
}

Layout lay_out(const TokenIds& tokens, const std::vector<const VisualRows*>& pictures,
               const Bundle& bundle) {
  Layout layout;
  layout.positions.resize(bundle.axes());
  const std::int64_t placeholder = bundle.prompt.image_token_id;
  std::int64_t position = 0;
  std::size_t next = 0;
  const auto refuse = [&] {
    const auto found = std::count(tokens.begin(), tokens.end(), placeholder);
    throw Fault("the prompt's " + std::to_string(found) + " image placeholders are not the runs of " +
                "its " + std::to_string(pictures.size()) + " pictures or tiles");
  };
  for (std::size_t column = 0; column < tokens.size();) {
    if (tokens[column] != placeholder) {
      add_row(layout, tokens[column++], 0,
              std::vector<std::int64_t>(layout.positions.size(), position++));
      continue;
    }
    if (next == pictures.size()) refuse();
    const VisualRows& picture = *pictures[next++];
    for (std::int64_t i = 0; i < picture.placeholders; ++i, ++column) {
      if (column == tokens.size() || tokens[column] != placeholder) refuse();
    }
    position = add_picture(layout, picture, position, bundle);
  }
  if (next != pictures.size()) refuse();
  layout.next_position = position;
  return layout;
}

}  // namespace pocketvlm
