#include "picture.h"

#include <algorithm>
#include <cstring>

#include "fault.h"

namespace pocketvlm {
namespace {

bool starts_with(const Bytes& content, std::initializer_list<int> signature) {
  return content.size() >= signature.size() &&
         std::equal(signature.begin(), signature.end(), content.begin());
}

}  // namespace

void require_pixels(std::int64_t width, std::int64_t height, const std::string& where) {
  if (width < 1 || height < 1 || width > kMaxPixels || height > kMaxPixels ||
      width * height > kMaxPixels) {
    throw Fault(where + ": " + std::to_string(width) + " x " + std::to_string(height) +
                " pixels; allowed are 1 to " + std::to_string(kMaxPixels) + " in all");
  }
}

Picture read_picture(const Bytes& content, const std::string& where) {
  int orientation = 0;
  if (starts_with(content, {0xFF, 0xD8, 0xFF})) {
    const Picture picture = read_jpeg(content, where, &orientation);
    return upright(picture, orientation);
  }
  if (starts_with(content, {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'})) {
    const Picture picture = read_png(content, where, &orientation);
    return upright(picture, orientation);
  }
  throw Fault(where + ": not a picture in a format that is read; allowed are JPEG and PNG");
}

int exif_orientation(const std::uint8_t* block, std::size_t size) {
  if (size < 8) return 0;
  const bool is_little = block[0] == 'I' && block[1] == 'I';
  if (!is_little && !(block[0] == 'M' && block[1] == 'M')) return 0;
  const auto number = [&](std::size_t at, int bytes) {
    std::uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      value = value << 8 | block[at + (is_little ? bytes - 1 - i : i)];
    }
    return value;
  };
  const std::size_t directory = number(4, 4);
  if (directory > size || size - directory < 2) return 0;
  const std::size_t entries = number(directory, 2);
  for (std::size_t entry = 0; entry < entries; ++entry) {
    const std::size_t at = directory + 2 + 12 * entry;
    if (size < 12 || at > size - 12) return 0;
    constexpr std::uint32_t kOrientationTag = 274, kShort = 3;
    if (number(at, 2) == kOrientationTag && number(at + 2, 2) == kShort) {
      const int found = static_cast<int>(number(at + 8, 2));
      return 1 <= found && found <= 8 ? found : 1;
    }
  }
  return 0;
}

int xmp_orientation(const std::uint8_t* block, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(block), size);
  for (const char* mark : {"tiff:Orientation=\"", "tiff:Orientation>"}) {
    const auto at = text.find(mark);
    if (at == std::string::npos || at + std::strlen(mark) >= text.size()) continue;
    const int found = text[at + std::strlen(mark)] - '0';
    if (1 <= found && found <= 8) return found;
  }
  return 0;
}

Picture upright(const Picture& picture, int orientation) {
  if (orientation < 2) return picture;
  const bool is_transposed = orientation >= 5;
  const int width = picture.width, height = picture.height;
  Picture result(is_transposed ? height : width, is_transposed ? width : height);
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x) {
      int from_x = is_transposed ? y : x, from_y = is_transposed ? x : y;
      if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
        from_x = width - 1 - from_x;
      }
      if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
        from_y = height - 1 - from_y;
      }
      std::copy_n(picture.at(from_x, from_y), 3, result.at(x, y));
    }
  }
  return result;
}

}  // namespace pocketvlm
