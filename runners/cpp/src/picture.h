// Pictures: eight bits of red, green and blue per pixel, upright, nothing transparent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "files.h"

namespace pocketvlm {

// The most pixels that are decoded or made on the way to the vision graph.
constexpr std::int64_t kMaxPixels = std::int64_t{1} << 26;

struct Picture {
  Picture(int wide, int high)
      : width(wide), height(high), rgb(std::size_t{3} * wide * high) {}

  std::uint8_t* at(int x, int y) { return rgb.data() + 3 * (std::size_t(y) * width + x); }
  const std::uint8_t* at(int x, int y) const {
    return rgb.data() + 3 * (std::size_t(y) * width + x);
  }

  int width, height;
  std::vector<std::uint8_t> rgb;
};

// A JPEG or PNG file as a person sees it; `where` names it in messages.
Picture read_picture(const Bytes& content, const std::string& where);

// Refuses a picture of more pixels than are decoded, or of none.
void require_pixels(std::int64_t width, std::int64_t height, const std::string& where);

Picture read_jpeg(const Bytes& content, const std::string& where, int* orientation);
Picture read_png(const Bytes& content, const std::string& where, int* orientation);

// The orientation, 1 to 8, in a block of EXIF (TIFF) or of XMP; 0 if it names none.
int exif_orientation(const std::uint8_t* block, std::size_t size);
int xmp_orientation(const std::uint8_t* block, std::size_t size);

// The picture turned and mirrored so that it stands upright.
Picture upright(const Picture& picture, int orientation);

}  // namespace pocketvlm
