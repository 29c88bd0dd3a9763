#include "conversation.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "fault.h"
#include "text_stream.h"

namespace pocketvlm {

// Collects the time between laps by stage, in milliseconds.
class Conversation::Clock {
 public:
  void lap(const std::string& stage) {
    const auto now = std::chrono::steady_clock::now();
    laps_[stage].push_back(std::chrono::duration<double, std::milli>(now - last_).count());
    last_ = now;
  }

  // Counts the time since the last lap towards nothing: the caller had it.
  void skip() { last_ = std::chrono::steady_clock::now(); }

  const std::vector<double>& laps(const std::string& stage) { return laps_[stage]; }

  double sum(const std::string& stage) {
    return std::accumulate(laps_[stage].begin(), laps_[stage].end(), 0.0);
  }

  // Of all laps.
  double total() const {
    double sum = 0;
    for (const auto& [stage, laps] : laps_) sum = std::accumulate(laps.begin(), laps.end(), sum);
    return sum;
  }

 private:
  std::map<std::string, std::vector<double>> laps_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

Inputs Inputs::open(const std::filesystem::path& path) {
  Bundle bundle = Bundle::open(path);
  PromptCodec codec = PromptCodec::from_bundle(bundle);
  std::vector<Sight> sights;
  for (const Vision& vision : bundle.visions) {
    const Signature& pixels = bundle.component("vision", vision.name).input("pixel_values");
    const Size size{static_cast<int>(pixels.fixed(3)), static_cast<int>(pixels.fixed(2))};
    sights.push_back({vision, Preprocessor::from_bundle(path, bundle.family, size)});
  }
  return {std::move(bundle), std::move(codec), std::move(sights)};
}

namespace {

// A choice in words.
std::string spell(const VisionChoice& choice) {
  std::string text;
  if (choice.visual_tokens) text = std::to_string(*choice.visual_tokens) + " visual tokens";
  if (!choice.resolution) return text;
  return text + (text.empty() ? "" : " of ") + std::to_string(choice.resolution->width) + " x " +
         std::to_string(choice.resolution->height) + " pixels";
}

}  // namespace

const Sight& Inputs::choose(Size picture, const VisionChoice& wanted) const {
  const Sight* chosen = nullptr;
  double least = 0;
  std::string there;
  for (const Sight& sight : sights) {
    const Size size = sight.preprocessor.size();
    there += (there.empty() ? "" : ", ") + spell({sight.vision.kept, size});
    if (wanted.visual_tokens && *wanted.visual_tokens != sight.vision.kept) continue;
    if (wanted.resolution && (wanted.resolution->width != size.width ||
                              wanted.resolution->height != size.height)) {
      continue;
    }
    // How much more the picture is stretched along one side than along the other.
    const double across = double(size.width) * picture.height;
    const double down = double(size.height) * picture.width;
    const double stretch = std::max(across, down) / std::min(across, down);
    if (chosen == nullptr || stretch < least) {
      chosen = &sight;
      least = stretch;
    }
  }
  if (chosen == nullptr) {
    throw Fault("no vision graph for " + spell(wanted) + "; this bundle has " + there);
  }
  return *chosen;
}

std::int64_t default_rows(const Bundle& bundle) {
  constexpr std::int64_t kRows = 2048;
  return std::min(kRows, bundle.generation.max_positions);
}

void require_greedy(const Bundle& bundle) {
  if (bundle.generation.settings.empty()) return;
  throw Fault(bundle.path.string() + ": generation setting " + bundle.generation.settings.front() +
              " is not applied by this runner");
}

void Conversation::reset() {
  shown_.clear();
  answers_.clear();
  cached_ = {};
  cached_tokens_.clear();
  engine_.truncate(0);
}

void Conversation::encode_ahead(const Bytes& picture, const VisionChoice& vision) {
  Clock clock;
  const std::vector<Picked> picked = pick({"", {picture}, vision});
  std::int64_t placeholders = 0;
  for (const PicturePlace& place : places(picked)) {
    placeholders += place.grid.all_tiles() * place.placeholders;
  }
  require_least(TokenIds(placeholders, bundle_.prompt.image_token_id), picked);
  look(picked, clock);
}

Answer Conversation::ask(const Question& question, const Limits& limits,
                         const std::function<void(const std::string&)>& on_piece,
                         const std::function<void()>& on_first_token) {
  Clock clock;
  const std::vector<Picked> picked = pick(question);
  clock.lap("preprocess");
  const TokenIds tokens = codec_.encode(question.rendered, places(picked), answers_);
  require_least(tokens, picked);
  clock.lap("tokenize");
  look(picked, clock);
  const Layout layout = lay_out(tokens, tiles(shown_), bundle_);
  clock.lap("tokenize");
  const std::int64_t reused = engine_.truncate(reusable_rows(layout));
  const std::vector<float> embeds = embed_rows(layout, reused);
  clock.lap("embed");
  cached_ = layout;
  cached_tokens_.clear();

  Answer answer;
  TextStream stream(codec_.tokenizer());
  const std::vector<float>* logits = &prefill(layout, embeds, reused);
  clock.lap("prefill");
  while (answer.stop_reason.empty()) {
    const auto best = std::max_element(logits->begin(), logits->end());
    const std::int64_t token = best - logits->begin();
    clock.lap("sample");
    const bool ends = !limits.ignores_end && is_end(token);
    const std::string piece = ends ? "" : stream.push(token);
    clock.lap("detokenize");
    if (++answer.times.new_tokens == 1) {
      answer.times.ttft_user_ms = clock.total();
      on_first_token();
    }
    if (!piece.empty()) on_piece(piece);
    clock.skip();
    const std::int64_t position = layout.next_position + answer.times.new_tokens - 1;
    if (ends) {
      answer.stop_reason = "end";
      break;
    }
    answer.tokens.push_back(token);
    cached_tokens_.push_back(token);
    if (answer.times.new_tokens == limits.new_tokens) {
      answer.stop_reason = "max_new_tokens";
    } else if (engine_.length() == engine_.capacity() ||
               position >= bundle_.generation.max_positions) {
      answer.stop_reason = "capacity";
    } else {
      logits = &engine_.step(token, position);
      clock.lap("decode");
    }
  }
  const std::string piece = stream.finish();
  if (!piece.empty()) on_piece(piece);
  answer.text = stream.text();
  answers_.push_back(answer.text);
  answer.visual_tokens = std::count_if(layout.codes.begin(), layout.codes.end(),
                                       [](std::int64_t code) { return code < 0; });

  AnswerTimes& times = answer.times;
  if (!question.pictures.empty()) {
    times.preprocess_ms = clock.sum("preprocess");
    times.vision_ms = clock.sum("vision");
  }
  times.tokenize_ms = clock.sum("tokenize");
  times.embed_ms = clock.sum("embed");
  times.prefill_ms = clock.sum("prefill");
  times.decode_ms = clock.laps("decode");
  times.sample_ms = clock.laps("sample");
  times.detokenize_ms = clock.laps("detokenize");
  times.ttft_engine_ms = times.prefill_ms + times.sample_ms.front();
  times.decode_span_ms = clock.total() - times.ttft_user_ms;
  times.prompt_tokens = layout.rows() - reused;
  times.reused_tokens = reused;
  return answer;
}

std::vector<Conversation::Picked> Conversation::pick(const Question& question) const {
  std::vector<Picked> picked;
  for (const Bytes& content : question.pictures) {
    Picture picture = read_picture(content, "the picture");
    const Sight& sight = inputs_.choose({picture.width, picture.height}, question.vision);
    TileGrid grid = sight.preprocessor.cut(picture);
    picked.push_back({std::move(picture), sight, std::move(grid)});
  }
  return picked;
}

void Conversation::look(const std::vector<Picked>& pictures, Clock& clock) {
  for (const auto& [picture, sight, cut] : pictures) {
    const auto& [vision, preprocessor] = sight;
    auto [grid, pixels] = preprocessor.see(picture);
    Shown shown{{std::move(grid), vision.placeholders}, {}};
    clock.lap("preprocess");
    const std::size_t numbers = preprocessor.tile_numbers();
    std::size_t first = 0;
    for (int number = 0; number < shown.place.grid.all_tiles(); ++number) {
      TileRows rows;  // none of a tile that is left out
      if (!shown.place.grid.leaves_out(number)) {
        rows = engine_.encode_tile(vision, pixels.data() + first, numbers);
        first += numbers;
      }
      shown.tiles.push_back({std::move(rows.embeds), std::move(rows.indices),
                             vision.placeholders, vision.position_grid, serial_++});
    }
    clock.lap("vision");
    shown_.push_back(std::move(shown));
  }
}

std::vector<PicturePlace> Conversation::places(const std::vector<Picked>& next) const {
  std::vector<PicturePlace> found;
  for (const Shown& shown : shown_) found.push_back(shown.place);
  for (const Picked& one : next) found.push_back({one.grid, one.sight.vision.placeholders});
  return found;
}

std::vector<const VisualRows*> Conversation::tiles(const std::vector<Shown>& pictures) {
  std::vector<const VisualRows*> found;
  for (const Shown& shown : pictures) {
    for (const VisualRows& tile : shown.tiles) found.push_back(&tile);
  }
  return found;
}

Conversation::Shown Conversation::stand_in(const Vision& vision, const TileGrid& grid) {
  Shown shown{{grid, vision.placeholders}, {}};
  for (int number = 0; number < grid.all_tiles(); ++number) {
    std::vector<std::int64_t> indices(grid.leaves_out(number) ? 0 : vision.kept);
    std::iota(indices.begin(), indices.end(), 0);
    shown.tiles.push_back({{}, std::move(indices), vision.placeholders, vision.position_grid, 0});
  }
  return shown;
}

void Conversation::require_least(const TokenIds& tokens, const std::vector<Picked>& next) const {
  // Which tiles show nothing is known by their pixels, and asked only where it decides.
  for (const bool looks : {false, true}) {
    std::vector<Shown> coming;
    for (const auto& [picture, sight, cut] : next) {
      coming.push_back(
          stand_in(sight.vision, looks ? sight.preprocessor.without_empty(picture) : cut));
    }
    std::vector<const VisualRows*> all = tiles(shown_);
    for (const VisualRows* tile : tiles(coming)) all.push_back(tile);
    const Layout layout = lay_out(tokens, all, bundle_);
    if (looks) return require_room(layout);
    if (has_room(layout)) return;
  }
}

bool Conversation::has_room(const Layout& layout) const {
  return layout.rows() <= engine_.capacity() &&
         layout.next_position <= bundle_.generation.max_positions;
}

void Conversation::require_room(const Layout& layout) const {
  if (has_room(layout)) return;
  const auto visual = std::count_if(layout.codes.begin(), layout.codes.end(),
                                    [](std::int64_t code) { return code < 0; });
  const std::string rows = std::to_string(layout.rows()) + " rows of KV cache, " +
                           std::to_string(visual) + " of them for pictures";
  if (layout.rows() > engine_.capacity()) {
    throw Fault("the conversation needs " + rows + "; allowed are " +
                std::to_string(engine_.capacity()));
  }
  throw Fault("the conversation needs " + std::to_string(layout.next_position) +
              " positions for " + rows + "; the model has " +
              std::to_string(bundle_.generation.max_positions));
}

// Rows of the cache that the layout begins with. The last row is always run, for its logits, and
// rows that see each other are run together.
std::int64_t Conversation::reusable_rows(const Layout& layout) const {
  std::int64_t rows = 0;
  if (engine_.length() > 0) {
    rows = cached_.extended(cached_tokens_, engine_.length()).shared_rows(layout);
  }
  rows = std::min(rows, layout.rows() - 1);
  const std::vector<std::int64_t> mutual = layout.mutual(bundle_.cache.mutual_rows);
  while (rows > 0 && mutual[rows] >= 0 && mutual[rows] == mutual[rows - 1]) --rows;
  return rows;
}

std::vector<float> Conversation::embed_rows(const Layout& layout, std::int64_t start) {
  const auto width = static_cast<std::size_t>(engine_.width());
  TokenIds tokens;
  for (std::int64_t row = start; row < layout.rows(); ++row) {
    if (!layout.is_visual(row)) tokens.push_back(layout.codes[row]);
  }
  const std::vector<float> text = tokens.empty() ? std::vector<float>() : engine_.embed(tokens);
  std::map<std::int64_t, const VisualRows*> tiles;
  for (const Shown& shown : shown_) {
    for (const VisualRows& tile : shown.tiles) tiles[-1 - tile.serial] = &tile;
  }
  std::vector<float> rows(static_cast<std::size_t>(layout.rows() - start) * width);
  const float* next = text.data();
  float* to = rows.data();
  for (std::int64_t row = start; row < layout.rows(); ++row, to += width) {
    const float* from = next;
    if (layout.is_visual(row)) {
      from = tiles.at(layout.codes[row])->embeds.data() +
             static_cast<std::size_t>(layout.slots[row]) * width;
    } else {
      next += width;
    }
    std::copy_n(from, width, to);
  }
  return rows;
}

const std::vector<float>& Conversation::prefill(const Layout& layout,
                                                const std::vector<float>& embeds,
                                                std::int64_t start) {
  std::vector<std::vector<std::int64_t>> positions;
  for (const auto& axis : layout.positions) positions.emplace_back(axis.begin() + start, axis.end());
  std::vector<bool> is_visual;
  for (std::int64_t row = start; row < layout.rows(); ++row) {
    is_visual.push_back(layout.is_visual(row));
  }
  std::vector<std::int64_t> mutual = layout.mutual(bundle_.cache.mutual_rows);
  mutual.erase(mutual.begin(), mutual.begin() + start);
  return engine_.decode(embeds, positions, is_visual, mutual);
}

bool Conversation::is_end(std::int64_t token) const {
  const auto& ends = bundle_.generation.eos_token_ids;
  return std::find(ends.begin(), ends.end(), token) != ends.end();
}

}  // namespace pocketvlm
