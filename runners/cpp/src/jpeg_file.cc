// JPEG by libjpeg, with the settings that Pillow leaves at their defaults.
#include <csetjmp>
#include <cstdio>  // before jpeglib.h, which needs FILE
#include <cstring>

#include <jpeglib.h>

#include "fault.h"
#include "picture.h"

namespace pocketvlm {
namespace {

struct ErrorState {
  jpeg_error_mgr manager;
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void on_error(j_common_ptr codec) {
  auto* state = reinterpret_cast<ErrorState*>(codec->err);
  (*codec->err->format_message)(codec, state->message);
  std::longjmp(state->back, 1);
}

void on_message(j_common_ptr, int) {}

// libjpeg would invent the end of a truncated file, and grey pixels with it.
boolean on_end(j_decompress_ptr codec) {
  auto* state = reinterpret_cast<ErrorState*>(codec->err);
  std::snprintf(state->message, sizeof state->message, "the file ends early");
  std::longjmp(state->back, 1);
}

constexpr char kExif[] = "Exif\0";                              // and a second zero byte
constexpr char kXmp[] = "http://ns.adobe.com/xap/1.0/";  // and a zero byte

int orientation_of(const jpeg_decompress_struct& codec) {
  int from_exif = 0, from_xmp = 0;
  for (auto* marker = codec.marker_list; marker != nullptr; marker = marker->next) {
    const auto holds = [&](const char* name, std::size_t size) {
      return marker->data_length > size && std::memcmp(marker->data, name, size) == 0;
    };
    if (from_exif == 0 && holds(kExif, sizeof kExif)) {
      from_exif = exif_orientation(marker->data + sizeof kExif, marker->data_length - sizeof kExif);
    }
    if (from_xmp == 0 && holds(kXmp, sizeof kXmp)) {
      from_xmp = xmp_orientation(marker->data + sizeof kXmp, marker->data_length - sizeof kXmp);
    }
  }
  return from_exif != 0 ? from_exif : from_xmp;
}

// What goes wrong is left in `state.message`: no object with a destructor lives across longjmp.
bool decode(jpeg_decompress_struct& codec, ErrorState& state, const Bytes& content,
            const std::string& where, Picture& picture, int* orientation) {
  if (setjmp(state.back) != 0) return false;
  jpeg_create_decompress(&codec);
  jpeg_mem_src(&codec, content.data(), content.size());
  codec.src->fill_input_buffer = on_end;
  jpeg_save_markers(&codec, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&codec, TRUE);
  if (codec.num_components != 1 && codec.num_components != 3) {
    std::snprintf(state.message, sizeof state.message,
                  "%d colour components; this runner reads grey and RGB", codec.num_components);
    return false;
  }
  require_pixels(codec.image_width, codec.image_height, where);
  *orientation = orientation_of(codec);
  codec.out_color_space = JCS_RGB;
  jpeg_start_decompress(&codec);
  picture = Picture(static_cast<int>(codec.output_width), static_cast<int>(codec.output_height));
  while (codec.output_scanline < codec.output_height) {
    JSAMPROW row = picture.at(0, static_cast<int>(codec.output_scanline));
    jpeg_read_scanlines(&codec, &row, 1);
  }
  return true;
}

}  // namespace

Picture read_jpeg(const Bytes& content, const std::string& where, int* orientation) {
  jpeg_decompress_struct codec{};
  ErrorState state{};
  codec.err = jpeg_std_error(&state.manager);
  state.manager.error_exit = on_error;
  state.manager.emit_message = on_message;
  Picture picture(0, 0);
  bool is_decoded = false;
  try {
    is_decoded = decode(codec, state, content, where, picture, orientation);
  } catch (...) {
    jpeg_destroy_decompress(&codec);
    throw;
  }
  jpeg_destroy_decompress(&codec);
  if (!is_decoded) throw Fault(where + ": the picture is damaged or not supported: " + state.message);
  return picture;
}

}  // namespace pocketvlm
