// Pictures of any size to tiles of the size that the vision graph takes.
#pragma once

#include <vector>

#include "tiles.h"

namespace pocketvlm {

TileGrid grid_of(const Geometry& geometry, int width, int height);

std::vector<Picture> fit_tiles(const Picture& picture, const Geometry& geometry, Filter filter);

// Whether no two neighbouring blocks of 8 x 8 pixels differ by `levels` in the mean of a channel.
bool is_below_contrast(const Picture& tile, int levels);

}  // namespace pocketvlm
