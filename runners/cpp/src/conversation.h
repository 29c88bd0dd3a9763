// The loop of an app: questions and pictures in, answers out, stage by stage on the clock.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "engine.h"
#include "layout.h"
#include "prompt.h"
#include "tiles.h"

namespace pocketvlm {

// One answer, in milliseconds; the names are those of the line protocol.
struct AnswerTimes {
  std::optional<double> preprocess_ms, vision_ms;
  double tokenize_ms = 0, embed_ms = 0, prefill_ms = 0;
  std::vector<double> decode_ms, sample_ms, detokenize_ms;
  double ttft_user_ms = 0, ttft_engine_ms = 0, decode_span_ms = 0;
  std::int64_t prompt_tokens = 0, new_tokens = 0, reused_tokens = 0;
};

// What is asked of the vision graph that sees a picture, where a bundle has several.
struct VisionChoice {
  std::optional<std::int64_t> visual_tokens;  // of a tile; else the first number that there is
  std::optional<Size> resolution;             // of a tile; else the closest to the picture's ratio
};

// One turn of the user: what the chat template makes of it and of all turns before it, with a mark
// per picture and per earlier answer, and the encoded pictures that come with it.
struct Question {
  std::string rendered;
  std::vector<Bytes> pictures;
  VisionChoice vision;
};

struct Answer {
  std::string text;
  TokenIds tokens;  // without the one that ended it
  std::string stop_reason;
  std::int64_t visual_tokens = 0;  // rows of pictures in the prompt, those in the cache included
  AnswerTimes times;
};

struct Limits {
  std::int64_t new_tokens = 64;
  bool ignores_end = false;
};

// A vision graph with what stands before it.
struct Sight {
  Vision vision;
  Preprocessor preprocessor;
};

// What stands between an app's text and pictures and the graphs.
struct Inputs {
  Bundle bundle;
  PromptCodec codec;
  std::vector<Sight> sights;  // one or more

  static Inputs open(const std::filesystem::path& path);

  // What sees a picture of this size; throws Fault where no vision graph is as asked for.
  const Sight& choose(Size picture, const VisionChoice& wanted) const;
};

// Rows of the cache unless a caller knows better: 2048, or fewer where the model has fewer positions.
std::int64_t default_rows(const Bundle& bundle);

// Refuses a bundle whose answers are not simply the likeliest tokens.
void require_greedy(const Bundle& bundle);

class Conversation {
 public:
  // Both must outlive it.
  Conversation(const Inputs& inputs, Engine& engine)
      : inputs_(inputs), bundle_(inputs.bundle), codec_(inputs.codec), engine_(engine) {}

  // Starts over with an empty cache.
  void reset();

  // Encodes a picture of the next question before it is asked; pictures that come with the question
  // stand after it.
  void encode_ahead(const Bytes& picture, const VisionChoice& vision);

  // Asks; `on_piece` is called with each piece of text as soon as it is certain, `on_first_token`
  // once the first token is text. Neither is on the clock.
  Answer ask(const Question& question, const Limits& limits,
             const std::function<void(const std::string&)>& on_piece,
             const std::function<void()>& on_first_token = [] {});

 private:
  struct Shown {
    PicturePlace place;
    std::vector<VisualRows> tiles;
  };

  // A picture that no vision graph has seen yet, with the tiles that its size has.
  struct Picked {
    Picture picture;
    const Sight& sight;
    TileGrid grid;
  };

  class Clock;

  std::vector<Picked> pick(const Question& question) const;
  void look(const std::vector<Picked>& pictures, Clock& clock);

  // Of all pictures so far and these.
  std::vector<PicturePlace> places(const std::vector<Picked>& next) const;
  static std::vector<const VisualRows*> tiles(const std::vector<Shown>& pictures);

  // As many rows as a picture will have, without numbers.
  static Shown stand_in(const Vision& vision, const TileGrid& grid);

  // Refuses a prompt that has no room with its next pictures, before a vision graph runs.
  void require_least(const TokenIds& tokens, const std::vector<Picked>& next) const;
  bool has_room(const Layout& layout) const;
  void require_room(const Layout& layout) const;
  std::int64_t reusable_rows(const Layout& layout) const;
  std::vector<float> embed_rows(const Layout& layout, std::int64_t start);
  const std::vector<float>& prefill(const Layout& layout, const std::vector<float>& embeds,
                                    std::int64_t start);
  bool is_end(std::int64_t token) const;

  const Inputs& inputs_;
  const Bundle& bundle_;
  const PromptCodec& codec_;
  Engine& engine_;
  std::vector<Shown> shown_;
  std::vector<std::string> answers_;
  std::int64_t serial_ = 0;
  // What the engine's cache holds: the first rows of this layout with the tokens after it.
  Layout cached_;
  TokenIds cached_tokens_;
};

}  // namespace pocketvlm
