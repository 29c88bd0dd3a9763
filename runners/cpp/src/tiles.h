// What becomes of a picture before the vision graph: tiles of one size, as numbers.
#pragma once

#include <array>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "picture.h"
#include "resample.h"

namespace pocketvlm {

// How one picture is cut; the whole picture follows its tiles where there are several.
struct TileGrid {
  int rows = 1, columns = 1;
  std::vector<int> left_out{};  // tiles that are not seen, row by row from 0

  bool is_split() const { return rows * columns > 1; }
  int all_tiles() const { return rows * columns + (is_split() ? 1 : 0); }
  int tiles() const { return all_tiles() - static_cast<int>(left_out.size()); }
  bool leaves_out(int number) const;
};

// The tiles of a picture that are seen.
struct SeenTiles {
  TileGrid grid;
  std::vector<float> pixels;  // [tiles, 3, height, width]
};

struct Size {
  int width, height;
};

// CLIP's kind: padded to a square, resized, the centre cut out, each where the settings say so.
struct ClipGeometry {
  std::optional<Size> size;          // what is resized to, or
  std::optional<int> shortest_edge;  // the length of the shorter edge, or neither
  std::optional<int> crop;           // side of the centre
  std::optional<std::array<std::uint8_t, 3>> pad_color;
};

// Idefics3's kind: resized first to its own size, then to a square or to whole tiles.
struct SplitGeometry {
  int side;
  std::optional<Size> first;
  std::optional<int> longest_edge;
  bool is_split;
};

// InternVL's kind: the grid of tiles whose ratio is nearest to the picture's.
struct AspectGeometry {
  int side, fewest, most;
};

// Qwen2-VL's kind: one size, that of the vision graph.
struct FittedGeometry {
  Size size;
};

using Geometry = std::variant<ClipGeometry, SplitGeometry, AspectGeometry, FittedGeometry>;

class Preprocessor {
 public:
  // Reads processor_config.json or preprocessor_config.json of a bundle; throws Fault for what
  // this runner does not follow. `size` is that of the vision graph.
  static Preprocessor from_bundle(const std::filesystem::path& bundle, const std::string& family,
                                  Size size);

  // The tiles of a picture of this size; those that show nothing among them.
  TileGrid cut(const Picture& picture) const;

  // The same without those, where the bundle leaves them out.
  TileGrid without_empty(const Picture& picture) const;

  SeenTiles see(const Picture& picture) const;

  // Of one tile.
  Size size() const { return size_; }

  // Numbers of one tile.
  std::size_t tile_numbers() const { return std::size_t{3} * size_.width * size_.height; }

 private:
  TileGrid without_empty(const Picture& picture, const std::vector<Picture>& tiles) const;

  Geometry geometry_;
  Filter filter_ = Filter::kBicubic;
  std::optional<int> empty_contrast_;  // tiles of less show nothing and are left out
  Size size_{};
  std::array<std::array<float, 256>, 3> table_{};
};

}  // namespace pocketvlm
