// PNG by libpng; what is transparent shows white, and sixteen bits are cut to their upper eight.
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#include "fault.h"
#include "picture.h"

namespace pocketvlm {
namespace {

struct Source {
  const std::uint8_t* next;
  std::size_t left;
  char message[256];
};

[[noreturn]] void on_error(png_structp codec, png_const_charp message) {
  auto* source = static_cast<Source*>(png_get_error_ptr(codec));
  std::snprintf(source->message, sizeof source->message, "%s", message);
  std::longjmp(png_jmpbuf(codec), 1);
}

void on_warning(png_structp, png_const_charp) {}

void on_read(png_structp codec, png_bytep target, std::size_t size) {
  auto* source = static_cast<Source*>(png_get_io_ptr(codec));
  if (size > source->left) png_error(codec, "the file ends early");
  std::memcpy(target, source->next, size);
  source->next += size;
  source->left -= size;
}

struct Pixels {
  std::uint32_t width = 0, height = 0;
  int channels = 0;
  bool is_deep_grey = false;  // two bytes per pixel, the upper one first
  std::vector<std::uint8_t> bytes;
  std::vector<png_bytep> rows;
};

bool decode(png_structp codec, png_infop info, Source& source, const std::string& where,
            Pixels& pixels, int* orientation) {
  if (setjmp(png_jmpbuf(codec)) != 0) return false;
  png_set_read_fn(codec, &source, on_read);
  png_read_info(codec, info);
  int depth = 0, colors = 0;
  png_get_IHDR(codec, info, &pixels.width, &pixels.height, &depth, &colors, nullptr, nullptr,
               nullptr);
  require_pixels(pixels.width, pixels.height, where);
  const bool has_key = png_get_valid(codec, info, PNG_INFO_tRNS) != 0;
  if (depth == 16 && has_key) {
    png_error(codec, "16 bits with a transparent colour, which this runner does not read");
  }
  if (depth < 8 && colors == PNG_COLOR_TYPE_GRAY && has_key) {
    png_error(codec, "few bits of grey with a transparent one, which this runner does not read");
  }
  pixels.is_deep_grey = depth == 16 && colors == PNG_COLOR_TYPE_GRAY;
  if (depth == 16 && !pixels.is_deep_grey) png_set_strip_16(codec);
  png_set_expand(codec);  // palettes to RGB, fewer bits to eight, a transparent colour to alpha
  png_set_interlace_handling(codec);
  png_read_update_info(codec, info);
  pixels.channels = png_get_channels(codec, info);
  const std::size_t stride = png_get_rowbytes(codec, info);
  pixels.bytes.resize(stride * pixels.height);
  pixels.rows.resize(pixels.height);
  for (std::uint32_t y = 0; y < pixels.height; ++y) {
    pixels.rows[y] = pixels.bytes.data() + stride * y;
  }
  png_read_image(codec, pixels.rows.data());
  png_read_end(codec, info);
  *orientation = 0;
#ifdef PNG_eXIf_SUPPORTED
  png_uint_32 size = 0;
  png_bytep block = nullptr;
  if (png_get_eXIf_1(codec, info, &size, &block) != 0) {
    *orientation = exif_orientation(block, size);
  }
#endif
  png_textp texts = nullptr;
  const int count = png_get_text(codec, info, &texts, nullptr);
  for (int i = 0; i < count && *orientation == 0; ++i) {
    if (std::strcmp(texts[i].key, "XML:com.adobe.xmp") == 0) {
      *orientation = xmp_orientation(reinterpret_cast<const std::uint8_t*>(texts[i].text),
                                     std::strlen(texts[i].text));
    }
  }
  return true;
}

// A value over white, rounded as Pillow's `alpha_composite` rounds it.
std::uint8_t over_white(int value, int alpha) {
  if (alpha == 0) return 255;
  const std::uint32_t sum = 128u * (value * alpha + 255 * (255 - alpha)) + (0x80u << 7);
  return static_cast<std::uint8_t>((((sum >> 8) + sum) >> 8) >> 7);
}

Picture to_rgb(const Pixels& pixels) {
  Picture picture(static_cast<int>(pixels.width), static_cast<int>(pixels.height));
  const int channels = pixels.channels, colors = channels < 3 ? 1 : 3;
  const std::size_t count = std::size_t{pixels.width} * pixels.height;
  const std::uint8_t* from = pixels.bytes.data();
  std::uint8_t* to = picture.rgb.data();
  if (pixels.is_deep_grey) {
    // Values that all fit into eight bits are meant as such.
    bool is_shallow = true;
    for (std::size_t i = 0; i < count; ++i) is_shallow = is_shallow && from[2 * i] == 0;
    for (std::size_t i = 0; i < count; ++i) std::fill_n(to + 3 * i, 3, from[2 * i + is_shallow]);
    return picture;
  }
  for (std::size_t i = 0; i < count; ++i, from += channels, to += 3) {
    for (int channel = 0; channel < 3; ++channel) {
      const std::uint8_t value = from[colors == 1 ? 0 : channel];
      to[channel] = channels > colors ? over_white(value, from[colors]) : value;
    }
  }
  return picture;
}

}  // namespace

Picture read_png(const Bytes& content, const std::string& where, int* orientation) {
  Source source{content.data(), content.size(), {}};
  png_structp codec = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, on_error, on_warning);
  png_infop info = codec == nullptr ? nullptr : png_create_info_struct(codec);
  if (info == nullptr) throw Fault(where + ": libpng cannot be started");
  Pixels pixels;
  bool is_decoded = false;
  try {
    is_decoded = decode(codec, info, source, where, pixels, orientation);
  } catch (...) {
    png_destroy_read_struct(&codec, &info, nullptr);
    throw;
  }
  png_destroy_read_struct(&codec, &info, nullptr);
  if (!is_decoded) {
    throw Fault(where + ": the picture is damaged or not supported: " + source.message);
  }
  return to_rgb(pixels);
}

}  // namespace pocketvlm
