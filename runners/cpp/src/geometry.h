// Pictures of any size to tiles of the size that the vision graph takes.
#pragma once

#include <vector>

#include "tiles.h"

namespace pocketvlm {

TileGrid grid_of(const Geometry& geometry, int width, int height);

std::vector<Picture> fit_tiles(const Picture& picture, const Geometry& geometry, Filter filter);

}  // namespace pocketvlm
