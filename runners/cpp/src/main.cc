// pocketvlm-runner: answers from a bundle's ONNX graphs, or does a job of the line protocol.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "conversation.h"
#include "device.h"
#include "fault.h"
#include "json.h"
#include "onnx.h"
#include "protocol.h"

namespace {

using namespace pocketvlm;

constexpr const char* kUsage =
    R"(usage: pocketvlm-runner [--onnxruntime FILE] [--job FILE]
       pocketvlm-runner [--onnxruntime FILE] BUNDLE [--image FILE]... --rendered TEXT
                        [[--image FILE]... --rendered TEXT]... [--max-new-tokens N]
                        [--visual-tokens N] [--resolution WIDTHxHEIGHT] [--threads N]
                        [--json | --tokens | --pixels]

Without a bundle, does one job of the line protocol, read from standard input or from a file.
With one, answers: every --rendered is a turn of the conversation as the chat template writes it
up to where the answer begins, with one marker per picture of the --image before it. U+F0002
stands for each earlier answer. docs/native_runners.md shows how to make such a text.

  --onnxruntime FILE   ONNX Runtime's shared library; else the one beside this program, or the
                       system's
  --max-new-tokens N   tokens after which an answer is cut (64)
  --visual-tokens N    the vision graph with this many tokens per tile, where a bundle has several
  --resolution WxH     the one for pictures of this size; else the closest to a picture's ratio of
                       sides
  --threads N          threads of the heavy graphs (one per physical core)
  --json               one JSON document per answer, with its tokens
  --tokens             the tokens of every --rendered by itself, one JSON array a line; no answer
  --pixels             the numbers that the vision graph would be given of every --image, float32
                       in this machine's order of bytes; no answer
)";

enum class Output { kText, kJson, kTokens, kPixels };

struct Options {
  std::string library, job, bundle;
  std::vector<Question> turns;
  Limits limits;
  VisionChoice vision;
  int threads = 0;
  Output output = Output::kText;
  bool wants_help = false;
};

int positive(const std::string& name, const std::string& text) {
  std::size_t used = 0;
  int number = 0;
  try {
    number = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used != text.size() || number < 1) throw Fault(name + " " + text + ": not a number above 0");
  return number;
}

Size resolution(const std::string& name, const std::string& text) {
  const auto middle = text.find('x');
  if (middle == std::string::npos) throw Fault(name + " " + text + ": not WIDTHxHEIGHT");
  return {positive(name, text.substr(0, middle)), positive(name, text.substr(middle + 1))};
}

Options parse(const std::vector<std::string>& words) {
  Options options;
  std::vector<Bytes> pictures;
  for (std::size_t at = 0; at < words.size(); ++at) {
    const std::string& word = words[at];
    const auto value = [&]() -> const std::string& {
      if (at + 1 == words.size()) throw Fault(word + " needs a value");
      return words[++at];
    };
    if (word == "--help" || word == "-h") {
      options.wants_help = true;
    } else if (word == "--onnxruntime") {
      options.library = value();
    } else if (word == "--job") {
      options.job = value();
    } else if (word == "--image") {
      pictures.push_back(read_bytes(value()));
    } else if (word == "--rendered") {
      options.turns.push_back({value(), std::move(pictures), {}});
      pictures.clear();
    } else if (word == "--max-new-tokens") {
      options.limits.new_tokens = positive(word, value());
    } else if (word == "--visual-tokens") {
      options.vision.visual_tokens = positive(word, value());
    } else if (word == "--resolution") {
      options.vision.resolution = resolution(word, value());
    } else if (word == "--threads") {
      options.threads = positive(word, value());
    } else if (word == "--json") {
      options.output = Output::kJson;
    } else if (word == "--tokens") {
      options.output = Output::kTokens;
    } else if (word == "--pixels") {
      options.output = Output::kPixels;
    } else if (word.rfind("--", 0) == 0 || !options.bundle.empty()) {
      throw Fault(word + " is not understood; --help lists what is");
    } else {
      options.bundle = word;
    }
  }
  for (Question& turn : options.turns) turn.vision = options.vision;
  if (!pictures.empty()) throw Fault("--image needs a --rendered after it");
  if (options.bundle.empty() != options.turns.empty()) {
    throw Fault("a bundle needs --rendered, and the other way round; --help shows how");
  }
  if (!options.bundle.empty() && !options.job.empty()) {
    throw Fault("--job names its own bundle; leave the other out");
  }
  return options;
}

// What an app that has its own loop compares itself with.
void show_inputs(const Options& options, const Inputs& inputs) {
  for (const Question& question : options.turns) {
    std::vector<PicturePlace> places;
    for (const Bytes& content : question.pictures) {
      const Picture picture = read_picture(content, "the picture");
      const auto& [vision, preprocessor] =
          inputs.choose({picture.width, picture.height}, question.vision);
      const auto [grid, pixels] = preprocessor.see(picture);
      places.push_back({grid, vision.placeholders});
      if (options.output != Output::kPixels) continue;
      std::cout.write(reinterpret_cast<const char*>(pixels.data()),
                      static_cast<std::streamsize>(pixels.size() * sizeof(float)));
    }
    if (options.output == Output::kTokens) {
      std::cout << Json(inputs.codec.encode(question.rendered, places, {})).dump() << "\n";
    }
  }
}

void answer(const Options& options, const Inputs& inputs) {
  require_greedy(inputs.bundle);
  Engine engine(inputs.bundle, options.threads == 0 ? physical_cores() : options.threads,
                default_rows(inputs.bundle));
  Conversation conversation(inputs, engine);
  for (const Question& question : options.turns) {
    const Answer found =
        conversation.ask(question, options.limits, [&](const std::string& piece) {
          if (options.output == Output::kText) std::cout << piece << std::flush;
        });
    if (options.output == Output::kJson) {
      const Json document = {{"text", found.text},
                             {"token_ids", found.tokens},
                             {"stop_reason", found.stop_reason},
                             {"prompt_tokens", found.times.prompt_tokens},
                             {"visual_tokens", found.visual_tokens},
                             {"reused_tokens", found.times.reused_tokens}};
      std::cout << document.dump();
    }
    std::cout << std::endl;
  }
}

std::string standard_input() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

// What libraries print must not come between the lines of the protocol: descriptor 1 becomes
// standard error, and only the protocol is written to the real standard output.
int do_job(const Options& options) {
  std::FILE* out = fdopen(dup(STDOUT_FILENO), "w");
  dup2(STDERR_FILENO, STDOUT_FILENO);
  std::string job;
  if (options.job.empty()) {
    job = standard_input();
  } else {
    const Bytes content = read_bytes(options.job, std::size_t{1} << 31);
    job.assign(content.begin(), content.end());
  }
  const int status = run_job(job, options.library, out);
  std::fclose(out);
  return status;
}

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = parse({words + 1, words + count});
    if (options.wants_help) {
      std::cout << kUsage;
      return 0;
    }
    if (options.bundle.empty()) return do_job(options);
    const Inputs inputs = Inputs::open(options.bundle);
    if (options.output == Output::kTokens || options.output == Output::kPixels) {
      show_inputs(options, inputs);
      return 0;
    }
    open_onnx_runtime(options.library);
    answer(options, inputs);
    return 0;
  } catch (const std::bad_alloc&) {
    std::cerr << "error: memory ran out\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << one_line(error.what()) << "\n";
  }
  return 2;
}
