// A bundle: the folder, and of its manifest what an ONNX runner must know.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace pocketvlm {

struct Signature {
  std::string name, dtype;
  std::vector<std::variant<std::int64_t, std::string>> shape;  // a name stands for any length

  // The size of a dimension; throws Fault where it is not fixed.
  std::int64_t fixed(std::size_t dimension) const;
};

struct Component {
  std::string role, file;
  std::string variant;  // which vision graph it is; empty where there is one alone
  std::vector<Signature> inputs, outputs;
  std::int64_t least_rows = 0;  // of a call from which a prefill graph is used

  const Signature& input(const std::string& name) const;
  const Signature& output(const std::string& name) const;
};

struct PromptSettings {
  std::string image_token, image_prefix, image_suffix;
  std::int64_t image_token_id = 0;
  std::optional<std::string> tile_marker, whole_marker, image_mark;
  bool is_prefix = false;
  std::optional<std::int64_t> embedding_rows;
};

struct Generation {
  std::vector<std::int64_t> eos_token_ids;
  std::int64_t max_positions = 0;
  std::vector<std::string> settings;  // names of those that this runner does not apply
};

// Where visual rows leave the decoder: how many of `tokens` are left after each drop.
struct VisualSchedule {
  std::int64_t tokens = 1;
  std::vector<std::int64_t> kept;

  // Of so many visual rows of a call, those that are left after a drop.
  std::int64_t left(std::size_t drop, std::int64_t rows) const {
    return (rows * kept[drop] + tokens - 1) / tokens;
  }
  // Whether the last row of a call decides which rows are kept.
  bool is_ranked() const { return kept.front() > 0; }
};

struct Cache {
  std::int64_t layers = 0, kv_heads = 0, head_dim = 0;
  std::string dtype;
  std::optional<VisualSchedule> schedule;
  std::optional<std::string> mutual_rows;
};

// Visual tokens of a picture as a grid, where positions have three axes.
struct PositionGrid {
  std::int64_t rows, columns;
};

// One vision graph; its component says how large its pictures are.
struct Vision {
  std::string name;                            // as its component's `variant`
  std::int64_t kept = 0, placeholders = 0;     // visual tokens of a tile, and those of its prompt
  std::optional<PositionGrid> position_grid;
};

struct Bundle {
  std::filesystem::path path;
  std::string model, family;
  std::vector<Vision> visions;  // one or more
  bool keeps_positions = true;
  PromptSettings prompt;
  Generation generation;
  Cache cache;
  std::vector<Component> components;  // of the ONNX target
  std::string lowest_runtime;         // empty where none is named

  // Reads manifest.json; throws Fault for what is missing or unknown to this runner. Digests are
  // not compared: `pocketvlm verify` does that.
  static Bundle open(const std::filesystem::path& path);

  const Component& component(const std::string& role, const std::string& variant = "") const;

  // Axes along which rows are numbered.
  std::size_t axes() const { return visions.front().position_grid ? 3 : 1; }
  bool has(const std::string& role) const;
};

}  // namespace pocketvlm
