#include "block.h"

#include <algorithm>

#include "base64.h"
#include "device.h"
#include "fault.h"

namespace pocketvlm {
namespace {

using Time = std::chrono::steady_clock::time_point;

double seconds_since(Time start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Json to_json(const AnswerTimes& times) {
  return {
      {"preprocess_ms", or_null(times.preprocess_ms)},
      {"vision_ms", or_null(times.vision_ms)},
      {"tokenize_ms", times.tokenize_ms},
      {"embed_ms", times.embed_ms},
      {"prefill_ms", times.prefill_ms},
      {"decode_ms", times.decode_ms},
      {"sample_ms", times.sample_ms},
      {"detokenize_ms", times.detokenize_ms},
      {"ttft_user_ms", times.ttft_user_ms},
      {"ttft_engine_ms", times.ttft_engine_ms},
      {"decode_span_ms", times.decode_span_ms},
      {"prompt_tokens", times.prompt_tokens},
      {"new_tokens", times.new_tokens},
      {"reused_tokens", times.reused_tokens},
  };
}

// Rows that the whole conversation can take. An answer may become more tokens than it was when the
// next turn reads its text again: half a character is three bytes then.
std::int64_t needed_rows(const BlockJob& job, const Inputs& inputs) {
  std::vector<PicturePlace> places;
  for (const Question& turn : job.turns) {
    for (const Bytes& content : turn.pictures) {
      const Picture picture = read_picture(content, "the picture");
      const auto& [vision, preprocessor] =
          inputs.choose({picture.width, picture.height}, turn.vision);
      places.push_back({preprocessor.cut(picture), vision.placeholders});
    }
  }
  const std::vector<std::string> answers(job.turns.size() - 1);
  const auto prompt = inputs.codec.encode(job.turns.back().rendered, places, answers).size();
  const auto earlier = static_cast<std::int64_t>(answers.size());
  return static_cast<std::int64_t>(prompt) + job.limits.new_tokens * (1 + 3 * earlier);
}

class Measurement {
 public:
  Measurement(const BlockJob& job, const Emit& emit) : job_(job), emit_(emit) {}

  Json run() {
    sense();
    const ProcessMemory before = process_memory();
    Time loading = std::chrono::steady_clock::now();
    inputs_.emplace(Inputs::open(job_.bundle));
    require_greedy(inputs_->bundle);
    double load_ms = seconds_since(loading) * 1000;
    const std::int64_t capacity = needed_rows(job_, *inputs_);
    loading = std::chrono::steady_clock::now();
    engine_.emplace(inputs_->bundle, job_.threads, capacity);
    load_ms += seconds_since(loading) * 1000;
    conversation_.emplace(*inputs_, *engine_);
    const ProcessMemory after_load = process_memory();
    peaks_.end_phase("load");
    emit_({{"event", "loaded"}, {"load_ms", load_ms}});
    sense();
    const std::vector<Answer> cold = converse("cold");
    for (int i = 1; i < job_.warm_ups; ++i) converse("warm_up");
    std::vector<std::vector<Answer>> measured;
    for (int i = 0; i < job_.answers; ++i) {
      sense();
      measured.push_back(converse("measured"));
    }
    const Json sustained = sustain();
    const ProcessMemory after = process_memory();
    sense();
    const auto same = [&](const std::vector<Answer>& answers) {
      return std::equal(answers.begin(), answers.end(), cold.begin(), cold.end(),
                        [](const Answer& a, const Answer& b) { return a.tokens == b.tokens; });
    };
    Json answers = Json::array(), later = Json::array(), tokens = Json::array();
    for (std::size_t turn = 0; turn < job_.turns.size(); ++turn) {
      tokens.push_back(cold[turn].tokens);
      Json times = Json::array();
      for (const auto& one : measured) times.push_back(to_json(one[turn].times));
      if (turn == 0) {
        answers = times;
      } else {
        later.push_back(times);
      }
    }
    return {
        {"load_ms", load_ms},
        {"prompt", prompt(cold.front())},
        {"cold", to_json(cold.front().times)},
        {"answers", answers},
        {"later_turns", later},
        {"sustained", sustained},
        {"sensors", sensors_},
        {"memory",
         {{"counter", kMemoryCounter},
          {"before_load_rss_bytes", or_null(before.rss_bytes)},
          {"after_load_rss_bytes", or_null(after_load.rss_bytes)},
          {"peak_prefill_rss_bytes", or_null(peaks_.of("prefill"))},
          {"peak_decode_rss_bytes", or_null(peaks_.of("decode"))},
          {"peak_rss_bytes", or_null(peaks_.whole())},
          {"after_rss_bytes", or_null(after.rss_bytes)},
          {"before_load_pss_bytes", or_null(before.pss_bytes)},
          {"after_load_pss_bytes", or_null(after_load.pss_bytes)},
          {"after_pss_bytes", or_null(after.pss_bytes)}}},
        {"token_ids", tokens},
        {"is_repeatable", std::all_of(measured.begin(), measured.end(), same)},
    };
  }

 private:
  double at_ms() const { return seconds_since(started_) * 1000; }

  void sense() {
    Json sample = to_json(read_sensors(), at_ms());
    sensors_.push_back(sample);
    sample["event"] = "sensors";
    emit_(sample);
  }

  // One answer: the whole conversation from an empty cache.
  std::vector<Answer> converse(const char* kind) {
    std::vector<Answer> answers;
    conversation_->reset();
    for (const Question& question : job_.turns) {
      answers.push_back(conversation_->ask(
          question, job_.limits, [](const std::string&) {}, [&] { peaks_.end_phase("prefill"); }));
      peaks_.end_phase("decode");
      emit_({{"event", "answer"},
             {"kind", kind},
             {"turn", answers.size() - 1},
             {"at_ms", at_ms()},
             {"times", to_json(answers.back().times)}});
      if (answers.back().stop_reason == "capacity") {
        throw Fault("turn " + std::to_string(answers.size()) + " ended after " +
                    std::to_string(answers.back().times.new_tokens) + " of " +
                    std::to_string(job_.limits.new_tokens) +
                    " tokens, where the model had no more positions: ask for fewer");
      }
    }
    return answers;
  }

  Json sustain() {
    Json rows = Json::array();
    const Time start = std::chrono::steady_clock::now();
    while (job_.sustained_s && seconds_since(start) < *job_.sustained_s) {
      const std::vector<Answer> answers = converse("sustained");
      for (std::size_t turn = 0; turn < answers.size(); ++turn) {
        const AnswerTimes& times = answers[turn].times;
        rows.push_back({{"at_s", seconds_since(start)},
                        {"turn", turn},
                        {"ttft_user_ms", times.ttft_user_ms},
                        {"prefill_ms", times.prefill_ms},
                        {"decode_span_ms", times.decode_span_ms},
                        {"prompt_tokens", times.prompt_tokens},
                        {"new_tokens", times.new_tokens}});
      }
      sense();
    }
    return rows;
  }

  // The first turn's prompt in tokens; text is what stays when every picture's rows are left out.
  Json prompt(const Answer& first) const {
    const std::vector<PicturePlace> whole(job_.turns.front().pictures.size(), {{}, 1});
    const TokenIds tokens = inputs_->codec.encode(job_.turns.front().rendered, whole, {});
    const auto text = std::count_if(tokens.begin(), tokens.end(), [&](std::int64_t token) {
      return token != inputs_->bundle.prompt.image_token_id;
    });
    return {{"text_tokens", text},
            {"visual_tokens", first.visual_tokens},
            {"tokens", first.times.prompt_tokens}};
  }

  const BlockJob& job_;
  const Emit& emit_;
  const Time started_ = std::chrono::steady_clock::now();
  std::optional<Inputs> inputs_;
  std::optional<Engine> engine_;
  std::optional<Conversation> conversation_;
  PeakMemory peaks_;
  Json sensors_ = Json::array();
};

VisionChoice read_vision_choice(const Json& document) {
  VisionChoice choice;
  const auto vision = document.find("vision");
  if (vision == document.end()) return choice;
  if (const auto tokens = vision->find("visual_tokens"); tokens != vision->end() && !tokens->is_null()) {
    choice.visual_tokens = tokens->get<std::int64_t>();
  }
  if (const auto size = vision->find("resolution"); size != vision->end() && !size->is_null()) {
    choice.resolution = Size{size->at(0), size->at(1)};
  }
  return choice;
}

int counted(const Json& document, const char* name, int least, int otherwise) {
  const int count = document.value(name, otherwise);
  if (count < least) {
    throw Fault(std::string("job: ") + name + " is " + std::to_string(count) + "; at least " +
                std::to_string(least));
  }
  return count;
}

}  // namespace

BlockJob read_block_job(const Json& document) {
  const std::string runtime = document.at("runtime");
  if (runtime != "onnx") throw Fault("job: runtime is " + runtime + "; this runner has onnx");
  BlockJob job;
  job.bundle = document.at("bundle");
  std::vector<Bytes> pictures;
  if (document.contains("pictures")) {
    for (const Json& picture : document["pictures"]) pictures.push_back(decode_base64(picture));
  }
  const VisionChoice vision = read_vision_choice(document);
  for (const Json& turn : document.at("turns")) {
    if (!turn.contains("rendered") || turn["rendered"].is_null()) {
      throw Fault("job: a turn is not rendered, and this runner has no chat templates");
    }
    Question question{turn["rendered"], {}, vision};
    if (turn.contains("pictures")) {
      for (const std::size_t index : turn["pictures"].get<std::vector<std::size_t>>()) {
        if (index >= pictures.size()) throw Fault("job: a turn shows a picture that is not there");
        question.pictures.push_back(pictures[index]);
      }
    }
    job.turns.push_back(std::move(question));
  }
  if (job.turns.empty()) throw Fault("job: there are no turns");
  job.limits.new_tokens = counted(document, "new_tokens", 1, 0);
  job.limits.ignores_end = document.value("ignore_eos", true);
  job.warm_ups = counted(document, "warm_ups", 1, 1);
  job.answers = counted(document, "answers", 0, 1);
  job.threads = physical_cores();
  if (document.contains("threads") && !document["threads"].is_null()) {
    job.threads = counted(document, "threads", 1, 1);
  }
  if (document.contains("sustained_s") && !document["sustained_s"].is_null()) {
    job.sustained_s = document["sustained_s"].get<double>();
  }
  return job;
}

Json measure_block(const BlockJob& job, const Emit& emit) { return Measurement(job, emit).run(); }

}  // namespace pocketvlm
