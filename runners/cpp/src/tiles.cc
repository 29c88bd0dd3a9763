// Settings of image processors, and the arithmetic that all of them end in:
// (float32(float64(pixel) * factor) - mean) / deviation, a table of 256 values per channel.
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "fault.h"
#include "geometry.h"
#include "json.h"

namespace pocketvlm {
namespace {

constexpr int kLongest = 1 << 14;
constexpr int kMostTiles = 64;

enum class Kind { kClip, kPadding, kSiglip, kSplit, kAspect, kFitted };

// The library's classes. What is missing here is refused by its name.
const std::map<std::string, Kind> kKinds = {
    {"CLIPImageProcessor", Kind::kClip},         {"LlavaImageProcessor", Kind::kPadding},
    {"SiglipImageProcessor", Kind::kSiglip},     {"Gemma3ImageProcessor", Kind::kSiglip},
    {"Idefics3ImageProcessor", Kind::kSplit},    {"SmolVLMImageProcessor", Kind::kSplit},
    {"GotOcr2ImageProcessor", Kind::kAspect},    {"Qwen2VLImageProcessor", Kind::kFitted},
};

// The library's defaults of what the classes' documents may leave out.
Json defaults_of(Kind kind, const std::string& name) {
  const bool is_clip = kind == Kind::kClip || kind == Kind::kPadding;
  const bool has_clip_colors = is_clip || kind == Kind::kAspect || kind == Kind::kFitted;
  Json defaults = {{"rescale_factor", 1.0 / 255.0},
                   {"resample", kind == Kind::kSplit ? 1 : name == "Gemma3ImageProcessor" ? 2 : 3},
                   {"image_mean", {0.5, 0.5, 0.5}},
                   {"image_std", {0.5, 0.5, 0.5}}};
  if (has_clip_colors) {
    defaults["image_mean"] = {0.48145466, 0.4578275, 0.40821073};
    defaults["image_std"] = {0.26862954, 0.26130258, 0.27577711};
  }
  if (kind == Kind::kAspect) {
    defaults["min_patches"] = 1;
    defaults["max_patches"] = 12;
  }
  return defaults;
}

std::string without_ending(std::string name, const std::string& ending) {
  if (name.size() > ending.size() &&
      name.compare(name.size() - ending.size(), ending.size(), ending) == 0) {
    name.resize(name.size() - ending.size());
  }
  return name;
}

// The settings of one document; every read names the setting.
class Settings {
 public:
  Settings(const Json& config, const Json& defaults) : config_(config), defaults_(defaults) {}

  [[noreturn]] void refuse(const std::string& what) const { throw Fault(what); }

  bool flag(const char* name, bool otherwise) const {
    const auto found = config_.find(name);
    if (found == config_.end()) return otherwise;
    return found->is_null() ? false : found->get<bool>();
  }

  // What a document leaves out is the library's default for the class.
  const Json& value(const char* name) const {
    const auto found = config_.find(name);
    if (found != config_.end() && !found->is_null()) return *found;
    const auto otherwise = defaults_.find(name);
    if (found == config_.end() && otherwise != defaults_.end()) return *otherwise;
    refuse(std::string(name) + " is not stated, and this runner knows no default for it");
  }

  bool has(const char* name) const { return config_.contains(name) && !config_[name].is_null(); }

  int edge(const Json& number, const char* name) const {
    const int edge = number.get<int>();
    if (edge < 1 || edge > kLongest) {
      refuse(std::string(name) + " must be between 1 and " + std::to_string(kLongest));
    }
    return edge;
  }

  // Height and width, if these are what a size names.
  std::optional<Size> rectangle(const char* name) const {
    const Json& size = value(name);
    if (size.is_array() && size.size() == 2) return Size{edge(size[1], name), edge(size[0], name)};
    if (!size.is_object() || !size.contains("height") || !size.contains("width")) return {};
    return Size{edge(size["width"], name), edge(size["height"], name)};
  }

  int named_edge(const char* name, const char* key) const {
    const Json& size = value(name);
    if (size.is_number() && key == std::string("shortest_edge") &&
        !flag("default_to_square", false)) {
      return edge(size, name);
    }
    if (!size.is_object() || size.size() != 1 || !size.contains(key)) {
      refuse(std::string(name) + " must name " + key + ", or height and width");
    }
    return edge(size[key], name);
  }

  std::array<double, 3> channels(const char* name) const {
    const Json& stated = value(name);
    if (stated.is_number()) {
      const double number = stated.get<double>();
      return {number, number, number};
    }
    if (stated.size() != 3) refuse(std::string(name) + " must have three numbers");
    return {stated[0].get<double>(), stated[1].get<double>(), stated[2].get<double>()};
  }

 private:
  const Json& config_;
  const Json& defaults_;
};

Geometry clip_geometry(const Settings& settings, Kind kind) {
  ClipGeometry geometry;
  if (kind == Kind::kPadding && settings.flag("do_pad", false)) {
    const auto means = settings.channels("image_mean");
    geometry.pad_color.emplace();
    for (int i = 0; i < 3; ++i) {
      (*geometry.pad_color)[i] = static_cast<std::uint8_t>(static_cast<int>(means[i] * 255));
    }
  }
  if (settings.flag("do_pan_and_scan", false)) settings.refuse("do_pan_and_scan must be false");
  if (settings.flag("do_resize", true)) {
    geometry.size = settings.rectangle("size");
    if (!geometry.size) geometry.shortest_edge = settings.named_edge("size", "shortest_edge");
  }
  if (settings.flag("do_center_crop", kind != Kind::kSiglip)) {
    const auto crop = settings.rectangle("crop_size");
    geometry.crop = crop ? crop->height : settings.edge(settings.value("crop_size"), "crop_size");
    if (crop && crop->height != crop->width) settings.refuse("crop_size must be a square");
  }
  return geometry;
}

Geometry split_geometry(const Settings& settings) {
  SplitGeometry geometry{settings.named_edge("max_image_size", "longest_edge"), {}, {}, false};
  geometry.is_split = settings.flag("do_image_splitting", true);
  if (settings.flag("do_resize", true)) {
    geometry.first = settings.rectangle("size");
    if (!geometry.first) geometry.longest_edge = settings.named_edge("size", "longest_edge");
  } else if (geometry.is_split) {
    settings.refuse("do_resize must be true where do_image_splitting is");
  }
  const Geometry made = geometry;
  if (geometry.is_split && grid_of(made, 1, 1).tiles() > kMostTiles + 1) {
    settings.refuse("size and max_image_size cut a picture into too many tiles");
  }
  return made;
}

Geometry aspect_geometry(const Settings& settings, Size size) {
  AspectGeometry geometry{size.height, settings.value("min_patches").get<int>(),
                          settings.value("max_patches").get<int>()};
  if (geometry.fewest < 1 || geometry.fewest > geometry.most || geometry.most > kMostTiles) {
    settings.refuse("min_patches and max_patches must be 1 to 64, the smaller first");
  }
  const auto stated = settings.rectangle("size");
  if (!settings.flag("do_resize", true) || !stated || stated->height != stated->width) {
    settings.refuse("do_resize must be true, and size a square");
  }
  geometry.side = stated->height;
  return geometry;
}

Geometry geometry_of(const Settings& settings, Kind kind, Size size) {
  switch (kind) {
    case Kind::kSplit:
      return split_geometry(settings);
    case Kind::kAspect:
      return aspect_geometry(settings, size);
    case Kind::kFitted:
      return FittedGeometry{size};
    default:
      return clip_geometry(settings, kind);
  }
}

// Side by side, what a geometry makes of any picture.
Size made_size(const Geometry& geometry, Size graph) {
  if (const auto* clip = std::get_if<ClipGeometry>(&geometry)) {
    if (clip->crop) return {*clip->crop, *clip->crop};
    return clip->size.value_or(Size{0, 0});
  }
  if (const auto* split = std::get_if<SplitGeometry>(&geometry)) return {split->side, split->side};
  if (const auto* aspect = std::get_if<AspectGeometry>(&geometry)) {
    return {aspect->side, aspect->side};
  }
  return graph;
}

std::string default_kind(const std::string& family) {
  static const std::map<std::string, std::string> kinds = {
      {"llava", "LlavaImageProcessor"},     {"idefics3", "Idefics3ImageProcessor"},
      {"internvl", "GotOcr2ImageProcessor"}, {"qwen_vl", "Qwen2VLImageProcessor"},
      {"paligemma", "SiglipImageProcessor"}, {"gemma3", "Gemma3ImageProcessor"},
  };
  const auto found = kinds.find(family);
  return found == kinds.end() ? "of family " + family : found->second;
}

}  // namespace

Preprocessor Preprocessor::from_bundle(const std::filesystem::path& bundle,
                                       const std::string& family, Size size) {
  std::filesystem::path file = bundle / "processor_config.json";
  Json config;
  if (std::filesystem::exists(file)) {
    const Json document = read_json(file);
    if (document.contains("image_processor")) config = document["image_processor"];
  }
  if (config.is_null()) {
    file = bundle / "preprocessor_config.json";
    config = read_json(file);
  }
  return reading(file, [&] {
    std::string name = config.value("image_processor_type", default_kind(family));
    name = without_ending(without_ending(name, "Fast"), "Pil");
    const auto kind = kKinds.find(name);
    if (kind == kKinds.end()) {
      throw Fault("image processor " + name +
                  " is not followed by this runner; docs/native_runners.md lists those that are");
    }
    const Json defaults = defaults_of(kind->second, name);
    const Settings settings(config, defaults);
    for (const char* unknown : {"pad_size", "grid_rule", "second_grid"}) {
      if (settings.has(unknown)) settings.refuse(std::string(unknown) + " is not followed");
    }
    for (const char* layout : {"data_format", "input_data_format"}) {
      if (settings.has(layout) && settings.value(layout) != "channels_first") {
        settings.refuse(std::string(layout) + " must be channels_first or left out");
      }
    }
    Preprocessor made;
    made.size_ = size;
    made.geometry_ = geometry_of(settings, kind->second, size);
    const Size own = made_size(made.geometry_, size);
    if (own.width != size.width || own.height != size.height) {
      settings.refuse("makes pictures of " + std::to_string(own.width) + " x " +
                      std::to_string(own.height) + ", but the vision graph takes " +
                      std::to_string(size.width) + " x " + std::to_string(size.height));
    }
    const int resample = settings.value("resample").get<int>();
    if (resample < 1 || resample > 5) {
      settings.refuse("resample is " + std::to_string(resample) + "; allowed are 1 to 5");
    }
    made.filter_ = static_cast<Filter>(resample);
    if (settings.has("empty_tile_contrast")) {
      made.empty_contrast_ = settings.value("empty_tile_contrast").get<int>();
      if (*made.empty_contrast_ < 1 || *made.empty_contrast_ > 255) {
        settings.refuse("empty_tile_contrast must be 1 to 255");
      }
      const auto* split = std::get_if<SplitGeometry>(&made.geometry_);
      if (!std::holds_alternative<AspectGeometry>(made.geometry_) && !(split && split->is_split)) {
        settings.refuse("empty_tile_contrast is stated, and pictures are not cut into tiles");
      }
      if (own.height < 8) settings.refuse("empty_tile_contrast needs tiles of 8 pixels or more");
    }
    const bool rescales = settings.flag("do_rescale", true);
    const double factor = rescales ? settings.value("rescale_factor").get<double>() : 1.0;
    std::array<double, 3> means{}, deviations{1, 1, 1};
    if (settings.flag("do_normalize", true)) {
      means = settings.channels("image_mean");
      deviations = settings.channels("image_std");
    }
    for (int channel = 0; channel < 3; ++channel) {
      const float mean = static_cast<float>(means[channel]);
      const float deviation = static_cast<float>(deviations[channel]);
      if (!(std::fabs(deviation) >= 1e-6f)) settings.refuse("image_std must not be 0");
      for (int value = 0; value < 256; ++value) {
        made.table_[channel][value] = (static_cast<float>(value * factor) - mean) / deviation;
      }
    }
    return made;
  });
}

bool TileGrid::leaves_out(int number) const {
  return std::find(left_out.begin(), left_out.end(), number) != left_out.end();
}

TileGrid Preprocessor::cut(const Picture& picture) const {
  return grid_of(geometry_, picture.width, picture.height);
}

TileGrid Preprocessor::without_empty(const Picture& picture) const {
  if (!empty_contrast_) return cut(picture);
  return without_empty(picture, fit_tiles(picture, geometry_, filter_));
}

TileGrid Preprocessor::without_empty(const Picture& picture,
                                     const std::vector<Picture>& tiles) const {
  TileGrid grid = cut(picture);
  for (int number = 0; empty_contrast_ && grid.is_split() && number < grid.rows * grid.columns;
       ++number) {
    if (is_below_contrast(tiles[number], *empty_contrast_)) grid.left_out.push_back(number);
  }
  return grid;
}

SeenTiles Preprocessor::see(const Picture& picture) const {
  const std::vector<Picture> tiles = fit_tiles(picture, geometry_, filter_);
  TileGrid grid = without_empty(picture, tiles);
  const std::size_t plane = std::size_t(size_.width) * size_.height;
  std::vector<float> numbers(std::size_t(grid.tiles()) * 3 * plane);
  float* next = numbers.data();
  for (std::size_t number = 0; number < tiles.size(); ++number) {
    if (grid.leaves_out(static_cast<int>(number))) continue;
    const Picture& tile = tiles[number];
    for (int channel = 0; channel < 3; ++channel) {
      for (std::size_t i = 0; i < plane; ++i) {
        *next++ = table_[channel][tile.rgb[3 * i + channel]];
      }
    }
  }
  return {std::move(grid), std::move(numbers)};
}

}  // namespace pocketvlm
