// All roundings are those of the models' own processors, so that pixels and prompts agree with
// what a model was trained on for every size of a picture.
#include "geometry.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace pocketvlm {
namespace {

constexpr int kLongestEdge = 4096;  // Idefics3's limit of the first resize
constexpr int kWidestStrip = 64;
constexpr int kBlock = 8;  // pixels along an edge of what the contrast of a tile is taken of

Picture resized(const Picture& picture, Size size, Filter filter) {
  require_pixels(size.width, size.height, "a picture in between");
  require_pixels(size.width, picture.height, "a picture in between");
  return resize(picture, size.width, size.height, filter);
}

// What lies at (left, top) of the picture; black where nothing does.
Picture cut(const Picture& picture, int left, int top, int width, int height) {
  Picture part(width, height);
  for (int y = 0; y < height; ++y) {
    if (y + top < 0 || y + top >= picture.height) continue;
    const int first = std::max(0, -left), end = std::min(width, picture.width - left);
    if (end > first) {
      std::copy_n(picture.at(first + left, y + top), 3 * std::size_t(end - first),
                  part.at(first, y));
    }
  }
  return part;
}

int floor_half(int number) { return number >= 0 ? number / 2 : -((1 - number) / 2); }

Picture padded_to_square(const Picture& picture, const std::array<std::uint8_t, 3>& color) {
  const int side = std::max(picture.width, picture.height);
  require_pixels(side, side, "a picture that this model pads to a square");
  Picture square(side, side);
  for (std::size_t i = 0; i < square.rgb.size(); ++i) square.rgb[i] = color[i % 3];
  const int left = (side - picture.width) / 2, top = (side - picture.height) / 2;
  for (int y = 0; y < picture.height; ++y) {
    std::copy_n(picture.at(0, y), 3 * std::size_t(picture.width), square.at(left, y + top));
  }
  return square;
}

Picture with_shortest_edge(const Picture& source, int edge, Filter filter) {
  const auto longest = [&](const Picture& picture) {
    const double product = static_cast<double>(edge) * std::max(picture.width, picture.height);
    return static_cast<std::int64_t>(product / std::min(picture.width, picture.height));
  };
  if (longest(source) * edge > kMaxPixels) {
    // The middle of a very long strip is all that a centre crop will look at.
    const int shortest = std::min(source.width, source.height);
    const int wide = std::min(source.width, kWidestStrip * shortest);
    const int high = std::min(source.height, kWidestStrip * shortest);
    return with_shortest_edge(
        cut(source, (source.width - wide) / 2, (source.height - high) / 2, wide, high), edge,
        filter);
  }
  const int other = static_cast<int>(longest(source));
  const Size size = source.width <= source.height ? Size{edge, other} : Size{other, edge};
  return resized(source, size, filter);
}

Size first_size(const SplitGeometry& geometry, int width, int height) {
  if (geometry.first) return *geometry.first;
  const int length = *geometry.longest_edge;
  double ratio = static_cast<double>(width) / height;
  if (width >= height) {
    width = length;
    height = static_cast<int>(length / ratio);
    height += height % 2;
  } else {
    width = static_cast<int>(length * ratio);
    width += width % 2;
    height = length;
  }
  width = std::max(width, 1);
  height = std::max(height, 1);
  ratio = static_cast<double>(width) / height;
  if (width >= height && width > kLongestEdge) {
    width = kLongestEdge;
    height = static_cast<int>(kLongestEdge / ratio);
  } else if (height > width && height > kLongestEdge) {
    width = static_cast<int>(kLongestEdge * ratio);
    height = kLongestEdge;
  }
  return {std::max(width, 1), std::max(height, 1)};
}

Size tiled_size(const SplitGeometry& geometry, int width, int height) {
  const auto whole = [&](int length) {
    return std::max(1, (length + geometry.side - 1) / geometry.side) * geometry.side;
  };
  const Size first = first_size(geometry, width, height);
  const double ratio = static_cast<double>(first.width) / first.height;
  if (first.width >= first.height) {
    const int wide = whole(first.width);
    return {wide, whole(static_cast<int>(wide / ratio))};
  }
  const int high = whole(first.height);
  return {whole(static_cast<int>(high * ratio)), high};
}

bool has_first(const SplitGeometry& geometry) { return geometry.first || geometry.longest_edge; }

TileGrid grid_of_kind(const ClipGeometry&, int, int) { return {}; }

TileGrid grid_of_kind(const FittedGeometry&, int, int) { return {}; }

TileGrid grid_of_kind(const SplitGeometry& geometry, int width, int height) {
  if (!geometry.is_split) return {};
  const Size size = tiled_size(geometry, width, height);
  return {size.height / geometry.side, size.width / geometry.side};
}

// Of grids that are as near, the one of more tiles wins while the picture has more than half of
// its pixels.
TileGrid grid_of_kind(const AspectGeometry& geometry, int width, int height) {
  const double ratio = static_cast<double>(width) / height;
  double nearest = std::numeric_limits<double>::infinity();
  TileGrid best;
  for (int tiles = geometry.fewest; tiles <= geometry.most; ++tiles) {
    for (int columns = 1; columns <= tiles; ++columns) {
      if (tiles % columns != 0) continue;
      const int rows = tiles / columns;
      const double distance = std::fabs(ratio - static_cast<double>(columns) / rows);
      const bool is_filled = static_cast<double>(width) * height >
                             0.5 * geometry.side * geometry.side * columns * rows;
      if (distance < nearest || (distance == nearest && is_filled)) {
        best = {rows, columns};
        nearest = distance;
      }
    }
  }
  return best;
}

std::vector<Picture> cut_into_tiles(const Picture& picture, int side) {
  std::vector<Picture> tiles;
  for (int top = 0; top < picture.height; top += side) {
    for (int left = 0; left < picture.width; left += side) {
      tiles.push_back(cut(picture, left, top, side, side));
    }
  }
  return tiles;
}

std::vector<Picture> tiles_of_kind(const Picture& source, const ClipGeometry& geometry,
                                   Filter filter) {
  Picture picture = geometry.pad_color ? padded_to_square(source, *geometry.pad_color) : source;
  if (geometry.size) {
    picture = resized(picture, *geometry.size, filter);
  } else if (geometry.shortest_edge) {
    picture = with_shortest_edge(picture, *geometry.shortest_edge, filter);
  }
  if (geometry.crop) {
    const int side = *geometry.crop;
    picture = cut(picture, floor_half(picture.width - side), floor_half(picture.height - side),
                  side, side);
  }
  return {picture};
}

std::vector<Picture> tiles_of_kind(const Picture& picture, const SplitGeometry& geometry,
                                   Filter filter) {
  const Size square{geometry.side, geometry.side};
  if (!has_first(geometry)) return {resized(picture, square, filter)};
  const Picture first =
      resized(picture, first_size(geometry, picture.width, picture.height), filter);
  if (!geometry.is_split) return {resized(first, square, filter)};
  const Picture tiled =
      resized(first, tiled_size(geometry, picture.width, picture.height), filter);
  std::vector<Picture> tiles = cut_into_tiles(tiled, geometry.side);
  if (tiles.size() > 1) tiles.push_back(resized(tiled, square, filter));
  return tiles;
}

std::vector<Picture> tiles_of_kind(const Picture& picture, const AspectGeometry& geometry,
                                   Filter filter) {
  const TileGrid grid = grid_of_kind(geometry, picture.width, picture.height);
  const int side = geometry.side;
  std::vector<Picture> tiles = cut_into_tiles(
      resized(picture, {grid.columns * side, grid.rows * side}, filter), side);
  if (tiles.size() > 1) tiles.push_back(resized(picture, {side, side}, filter));
  return tiles;
}

std::vector<Picture> tiles_of_kind(const Picture& picture, const FittedGeometry& geometry,
                                   Filter filter) {
  return {resized(picture, geometry.size, filter)};
}

// The last block of an edge that is not whole blocks overlaps the one before it.
int block_sum(const Picture& tile, int column, int row, int channel) {
  const int left = std::min(column * kBlock, tile.width - kBlock);
  const int top = std::min(row * kBlock, tile.height - kBlock);
  int sum = 0;
  for (int y = top; y < top + kBlock; ++y) {
    for (int x = left; x < left + kBlock; ++x) sum += tile.at(x, y)[channel];
  }
  return sum;
}

}  // namespace

bool is_below_contrast(const Picture& tile, int levels) {
  const int columns = (tile.width + kBlock - 1) / kBlock;
  const int rows = (tile.height + kBlock - 1) / kBlock;
  const int limit = levels * kBlock * kBlock;
  std::vector<int> above(columns), line(columns);
  for (int channel = 0; channel < 3; ++channel) {
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) {
        line[column] = block_sum(tile, column, row, channel);
        if (column > 0 && std::abs(line[column] - line[column - 1]) >= limit) return false;
        if (row > 0 && std::abs(line[column] - above[column]) >= limit) return false;
      }
      above.swap(line);
    }
  }
  return true;
}

TileGrid grid_of(const Geometry& geometry, int width, int height) {
  return std::visit([&](const auto& kind) { return grid_of_kind(kind, width, height); }, geometry);
}

std::vector<Picture> fit_tiles(const Picture& picture, const Geometry& geometry, Filter filter) {
  return std::visit([&](const auto& kind) { return tiles_of_kind(picture, kind, filter); },
                    geometry);
}

}  // namespace pocketvlm
