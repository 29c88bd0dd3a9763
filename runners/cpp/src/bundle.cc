#include "bundle.h"

#include "fault.h"
#include "json.h"

namespace pocketvlm {
namespace {

constexpr int kSchema = 1;
constexpr std::int64_t kMostPositions = std::int64_t{1} << 24;

template <typename Value>
std::optional<Value> optional(const Json& document, const char* name) {
  const auto found = document.find(name);
  if (found == document.end() || found->is_null()) return {};
  return found->get<Value>();
}

std::vector<Signature> signatures(const Json& documents) {
  std::vector<Signature> result;
  for (const Json& document : documents) {
    Signature signature{document.at("name"), document.at("dtype"), {}};
    for (const Json& size : document.at("shape")) {
      if (size.is_string()) {
        signature.shape.emplace_back(size.get<std::string>());
      } else {
        signature.shape.emplace_back(size.get<std::int64_t>());
      }
    }
    result.push_back(std::move(signature));
  }
  return result;
}

const Signature& named(const std::vector<Signature>& all, const std::string& name,
                       const std::string& file) {
  for (const Signature& signature : all) {
    if (signature.name == name) return signature;
  }
  throw Fault(file + ": the manifest names no " + name + " of it");
}

void require_inside(const std::string& file) {
  const std::filesystem::path path(file);
  for (const auto& part : path) {
    if (path.is_absolute() || part == "..") throw Fault(file + ": lies outside the bundle");
  }
}

// A graph that this runner would leave out may be one that decides what is answered.
void require_known_role(const Component& component) {
  for (const char* known : {"vision", "embedding", "decoder", "prefill", "unpack"}) {
    if (component.role == known) return;
  }
  throw Fault(component.file + ": its role " + component.role + " is not known to this runner");
}

PromptSettings read_prompt(const Json& document) {
  PromptSettings prompt;
  prompt.image_token = document.at("image_token");
  prompt.image_token_id = document.at("image_token_id");
  prompt.image_prefix = document.value("image_prefix", "");
  prompt.image_suffix = document.value("image_suffix", "");
  prompt.tile_marker = optional<std::string>(document, "tile_marker");
  prompt.whole_marker = optional<std::string>(document, "whole_marker");
  prompt.image_mark = optional<std::string>(document, "image_mark");
  prompt.is_prefix = optional<bool>(document, "is_prefix").value_or(false);
  prompt.embedding_rows = optional<std::int64_t>(document, "embedding_rows");
  if (optional<std::string>(document, "line_break")) {
    throw Fault("prompt.line_break: pictures whose tiles make up one map are not known to this "
                "runner");
  }
  if (prompt.image_token.empty()) throw Fault("prompt.image_token is empty");
  return prompt;
}

std::optional<VisualSchedule> read_schedule(const Json& document) {
  const auto found = document.find("visual_schedule");
  if (found == document.end() || found->is_null()) return {};
  VisualSchedule schedule;
  schedule.tokens = found->value("tokens", std::int64_t{1});
  for (const Json& drop : found->at("drops")) {
    schedule.kept.push_back(drop.at("keep").get<std::int64_t>());
    const std::int64_t before =
        schedule.kept.size() == 1 ? schedule.tokens : schedule.kept[schedule.kept.size() - 2];
    if (schedule.kept.back() < 0 || schedule.kept.back() >= before || before > kMostPositions) {
      throw Fault("kv_cache.visual_schedule keeps more rows after a drop than before it");
    }
  }
  if (schedule.kept.empty()) throw Fault("kv_cache.visual_schedule has no drops");
  return schedule;
}

Cache read_cache(const Json& document) {
  Cache cache{document.at("layers"), document.at("kv_heads"), document.at("head_dim"),
              document.at("dtype"), read_schedule(document),
              optional<std::string>(document, "mutual_rows")};
  if (cache.dtype != "float32" && cache.dtype != "float16" && cache.dtype != "int8") {
    throw Fault("kv_cache.dtype is " + cache.dtype + "; allowed are float32, float16, int8");
  }
  if (cache.mutual_rows && *cache.mutual_rows != "tile" && *cache.mutual_rows != "prompt") {
    throw Fault("kv_cache.mutual_rows is " + *cache.mutual_rows + "; allowed are tile, prompt");
  }
  return cache;
}

Vision read_vision(const Json& document, const std::string& name) {
  Vision vision{name, document.at("visual_tokens"), document.at("visual_tokens_full"), {}};
  if (vision.kept < 1 || vision.kept > vision.placeholders || vision.placeholders > kMostPositions) {
    throw Fault("visual_tokens are " + std::to_string(vision.kept) + " of " +
                std::to_string(vision.placeholders));
  }
  if (const auto grid = document.find("position_grid"); grid != document.end() && !grid->is_null()) {
    vision.position_grid = PositionGrid{grid->at("rows"), grid->at("columns")};
    if (vision.position_grid->columns < 1 || vision.position_grid->rows < 1) {
      throw Fault("position_grid is empty");
    }
  }
  return vision;
}

// Every vision graph, in order; without `variants`, the one that the manifest itself describes.
std::vector<Vision> read_visions(const Json& document) {
  const auto variants = document.find("variants");
  if (variants == document.end() || variants->empty()) return {read_vision(document, "")};
  std::vector<Vision> visions;
  for (const Json& variant : *variants) {
    visions.push_back(read_vision(variant, variant.at("name")));
    if (visions.back().name.empty()) throw Fault("a vision graph of variants has no name");
    if (visions.back().position_grid.has_value() != visions.front().position_grid.has_value()) {
      throw Fault("variants number their rows along different axes");
    }
  }
  return visions;
}

Bundle read_manifest(const std::filesystem::path& path, const Json& document) {
  if (document.value("schema", 0) != kSchema) {
    throw Fault("bundle schema " + document.value("schema", Json()).dump() + "; this runner reads " +
                std::to_string(kSchema));
  }
  Bundle bundle;
  bundle.path = path;
  bundle.model = document.at("model");
  bundle.family = document.at("family");
  if (document.contains("tile_budget")) {
    throw Fault("tile_budget is not followed: this runner shows all tiles to one vision graph");
  }
  bundle.visions = read_visions(document);
  const std::string positions = document.at("positions");
  if (positions != "original" && positions != "consecutive") {
    throw Fault("positions are " + positions + "; known are original, consecutive");
  }
  bundle.keeps_positions = positions == "original";
  bundle.prompt = read_prompt(document.at("prompt"));
  const Json& generation = document.at("generation");
  generation.at("eos_token_ids").get_to(bundle.generation.eos_token_ids);
  bundle.generation.max_positions = generation.at("max_positions");
  if (bundle.generation.max_positions < 1 || bundle.generation.max_positions > kMostPositions) {
    throw Fault("generation.max_positions must be 1 to " + std::to_string(kMostPositions));
  }
  for (const auto& [name, value] : generation.at("settings").items()) {
    bundle.generation.settings.push_back(name);
  }
  bundle.cache = read_cache(document.at("kv_cache"));
  for (const Json& component : document.at("components")) {
    if (component.at("target") != "onnx") continue;
    bundle.components.push_back({component.at("role"), component.at("file"),
                                 optional<std::string>(component, "variant").value_or(""),
                                 signatures(component.at("inputs")),
                                 signatures(component.at("outputs")),
                                 component.value("least_rows", std::int64_t{0})});
    require_inside(bundle.components.back().file);
    require_known_role(bundle.components.back());
  }
  if (bundle.components.empty()) throw Fault("the bundle has no ONNX graphs");
  if (const auto runtimes = document.find("runtimes"); runtimes != document.end()) {
    if (const auto onnx = runtimes->find("onnx"); onnx != runtimes->end()) {
      bundle.lowest_runtime = onnx->at("lowest_version");
    }
  }
  return bundle;
}

}  // namespace

std::int64_t Signature::fixed(std::size_t dimension) const {
  if (dimension < shape.size()) {
    if (const auto* size = std::get_if<std::int64_t>(&shape[dimension])) {
      if (*size > 0) return *size;
    }
  }
  throw Fault(name + ": dimension " + std::to_string(dimension) + " is not fixed in the manifest");
}

const Signature& Component::input(const std::string& name) const {
  return named(inputs, name, file);
}

const Signature& Component::output(const std::string& name) const {
  return named(outputs, name, file);
}

Bundle Bundle::open(const std::filesystem::path& path) {
  const auto file = path / "manifest.json";
  if (!std::filesystem::exists(file)) {
    throw Fault(path.string() + ": no bundle here: manifest.json is missing");
  }
  const Json document = read_json(file);
  return reading(file, [&] { return read_manifest(path, document); });
}

bool Bundle::has(const std::string& role) const {
  for (const Component& component : components) {
    if (component.role == role) return true;
  }
  return false;
}

const Component& Bundle::component(const std::string& role, const std::string& variant) const {
  for (const Component& component : components) {
    if (component.role == role && component.variant == variant) return component;
  }
  const std::string named = variant.empty() ? "" : " " + variant;
  throw Fault(path.string() + ": no " + role + " graph" + named + " for target onnx");
}

}  // namespace pocketvlm
