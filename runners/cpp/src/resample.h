// Resizing as Pillow does it, to the last bit.
#pragma once

#include "picture.h"

namespace pocketvlm {

// Pillow's numbers of its filters.
enum class Filter { kLanczos = 1, kBilinear = 2, kBicubic = 3, kBox = 4, kHamming = 5 };

Picture resize(const Picture& source, int width, int height, Filter filter);

}  // namespace pocketvlm
