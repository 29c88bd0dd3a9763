#include "engine.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "fault.h"

namespace pocketvlm {
namespace {

const std::string kPast = "past.", kPresent = "present.";

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() &&
         text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

bool is_cache(const std::string& name) {
  return name.rfind(kPast, 0) == 0 && (ends_with(name, ".key") || ends_with(name, ".value"));
}

// glibc keeps what was freed while weights were expanded, which is several times their size.
void return_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// x86 processors without VNNI would add products of int8 weights in pairs of 16 bits, which
// saturate: the same bundle would answer differently there.
void require_exact_sums(Ort::SessionOptions& options) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (!__builtin_cpu_supports("avx512vnni")) {
    options.AddConfigEntry("session.x64quantprecision", "1");
  }
#elif defined(_M_X64)
  options.AddConfigEntry("session.x64quantprecision", "1");
#else
  static_cast<void>(options);
#endif
}

void require_names(const Ort::Session& session, const Component& component,
                   const std::string& file) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::set<std::string> found, stated;
  for (std::size_t at = 0; at < session.GetInputCount(); ++at) {
    found.insert(session.GetInputNameAllocated(at, allocator).get());
  }
  for (std::size_t at = 0; at < session.GetOutputCount(); ++at) {
    found.insert(session.GetOutputNameAllocated(at, allocator).get());
  }
  for (const Signature& signature : component.inputs) stated.insert(signature.name);
  for (const Signature& signature : component.outputs) stated.insert(signature.name);
  if (found != stated) {
    throw Fault(file + ": its inputs or outputs are not those that the manifest names");
  }
}

// What this runner gives a decoder; every other input is refused by its name.
void require_known(const Component& decoder) {
  static const std::set<std::string> kKnown = {"embeds",      "position_ids", "past_length",
                                               "text_rows",   "mutual",       "past_stage_lengths"};
  for (const Signature& input : decoder.inputs) {
    if (kKnown.count(input.name) == 0 && !is_cache(input.name)) {
      throw Fault(decoder.file + ": its input " + input.name + " is not known to this runner");
    }
  }
}

struct CacheType {
  ONNXTensorElementDataType type;
  std::size_t bytes;
};

CacheType cache_type(const std::string& dtype) {
  if (dtype == "int8") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1};
  if (dtype == "float16") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2};
  return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4};
}

}  // namespace

Engine::Engine(const Bundle& bundle, int threads, std::int64_t capacity)
    : bundle_(bundle),
      threads_(threads),
      capacity_(capacity),
      memory_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU)) {
  if (bundle.cache.schedule) {
    const std::size_t drops = bundle.cache.schedule->kept.size();
    counts_.assign(drops, std::vector<bool>(static_cast<std::size_t>(capacity)));
    past_stage_lengths_.resize(drops);
  }
  const std::string version = open_onnx_runtime({});
  if (!bundle.lowest_runtime.empty() && is_older(version, bundle.lowest_runtime)) {
    throw Fault(bundle.path.string() + ": its graphs need ONNX Runtime " + bundle.lowest_runtime +
                " or newer; " + version + " was opened");
  }
  const Component& decoder = bundle.component("decoder");
  require_known(decoder);
  vision_ = load(bundle.component("vision", bundle.visions.front().name), threads);
  // The embedding is a lookup: threads of its own would only spin beside the decoder's.
  embedding_ = load(bundle.component("embedding"), 1);
  decoder_ = load(decoder, threads);
  width_ = bundle.component("embedding").output("embeds").fixed(2);
  axes_ = bundle.axes();
  embeds_.resize(static_cast<std::size_t>(width_));
  logits_.resize(static_cast<std::size_t>(decoder.output("logits").fixed(2)));
  position_.resize(axes_);
  allocate_cache(decoder);
  embed_step_ = Ort::IoBinding(embedding_.session);
  embed_step_.BindInput("input_ids", whole_numbers(token_, {1, 1}));
  embed_step_.BindOutput("embeds", floats(embeds_, {1, 1, width_}));
  decode_step_ = bind_decoder();
  decode_step_.BindInput("embeds", floats(embeds_, {1, 1, width_}));
  decode_step_.BindInput("position_ids",
                         whole_numbers(position_, {static_cast<std::int64_t>(axes_), 1}));
  if (bundle.cache.schedule) {
    decode_step_.BindInput("text_rows", whole_numbers(single_row_, {1}));
  }
  if (bundle.cache.mutual_rows) decode_step_.BindInput("mutual", whole_numbers(alone_, {1, 1}));
  decode_rows_ = bind_decoder();
}

Engine::Graph Engine::load(const Component& component, int threads) const {
  Graph graph{(bundle_.path / component.file).string(), component.variant};
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.SetInterOpNumThreads(1);
  options.SetIntraOpNumThreads(threads);
  require_exact_sums(options);
  if (component.role == "vision") {
    // It runs once per picture: its threads must not spin while the decoder's work, and keeping
    // its activations would cost memory and save nothing.
    options.AddConfigEntry("session.force_spinning_stop", "1");
    options.DisableCpuMemArena();
    options.DisableMemPattern();
  }
  try {
    graph.session = Ort::Session(onnx_environment(), graph.file.c_str(), options);
  } catch (const Ort::Exception& error) {
    throw Fault(graph.file + ": ONNX Runtime cannot load it: " + first_line(error.what()));
  }
  require_names(graph.session, component, graph.file);
  return_freed_memory();
  return graph;
}

void Engine::allocate_cache(const Component& decoder) {
  const auto [type, bytes] = cache_type(bundle_.cache.dtype);
  for (const Signature& input : decoder.inputs) {
    if (!is_cache(input.name)) continue;
    const std::vector<std::int64_t> shape = {1, input.fixed(1), capacity_, input.fixed(3)};
    const auto count = static_cast<std::size_t>(shape[1] * shape[2] * shape[3]);
    // calloc leaves fresh pages to the system, so that unused capacity costs no memory.
    Buffer buffer{input.name.substr(kPast.size()),
                  std::unique_ptr<void, Freed>(std::calloc(count, bytes))};
    if (!buffer.memory) {
      throw Fault("the KV cache of " + std::to_string(capacity_) + " rows does not fit into memory");
    }
    buffer.value = Ort::Value::CreateTensor(memory_, buffer.memory.get(), count * bytes,
                                            shape.data(), shape.size(), type);
    cache_.push_back(std::move(buffer));
  }
}

Ort::IoBinding Engine::bind_decoder() {
  Ort::IoBinding binding(decoder_.session);
  binding.BindInput("past_length", whole_numbers(past_length_, {1}));
  if (bundle_.cache.schedule) {
    const auto drops = static_cast<std::int64_t>(past_stage_lengths_.size());
    binding.BindInput("past_stage_lengths", whole_numbers(past_stage_lengths_, {drops}));
  }
  const auto vocabulary = static_cast<std::int64_t>(logits_.size());
  binding.BindOutput("logits", floats(logits_, {1, 1, vocabulary}));
  for (const Buffer& buffer : cache_) {
    // The same memory is read and written: attention appends rows in place.
    binding.BindInput((kPast + buffer.name).c_str(), buffer.value);
    binding.BindOutput((kPresent + buffer.name).c_str(), buffer.value);
  }
  return binding;
}

TileRows Engine::encode_tile(const Vision& vision, float* pixels, std::size_t numbers) {
  std::vector<std::int64_t> shape;
  const Component& component = bundle_.component("vision", vision.name);
  if (vision_.variant != vision.name) {
    vision_ = {};  // before another takes memory
    vision_ = load(component, threads_);
  }
  const Signature& input = component.input("pixel_values");
  for (std::size_t at = 0; at < input.shape.size(); ++at) shape.push_back(input.fixed(at));
  const Ort::Value value =
      Ort::Value::CreateTensor<float>(memory_, pixels, numbers, shape.data(), shape.size());
  const char* inputs[] = {"pixel_values"};
  const char* outputs[] = {"embeds", "indices"};
  try {
    auto results = vision_.session.Run(Ort::RunOptions(nullptr), inputs, &value, 1, outputs, 2);
    const auto kept = results[1].GetTensorTypeAndShapeInfo().GetElementCount();
    const float* embeds = results[0].GetTensorData<float>();
    const auto* indices = results[1].GetTensorData<std::int64_t>();
    return {{embeds, embeds + kept * static_cast<std::size_t>(width_)}, {indices, indices + kept}};
  } catch (const Ort::Exception& error) {
    throw Fault(vision_.file + ": ONNX Runtime cannot run it: " + first_line(error.what()));
  }
}

std::vector<float> Engine::embed(const TokenIds& tokens) {
  TokenIds ids = tokens;
  const auto count = static_cast<std::int64_t>(ids.size());
  std::vector<float> embeds(ids.size() * static_cast<std::size_t>(width_));
  Ort::IoBinding binding(embedding_.session);
  binding.BindInput("input_ids", whole_numbers(ids, {1, count}));
  binding.BindOutput("embeds", floats(embeds, {1, count, width_}));
  run(embedding_, binding);
  return embeds;
}

const std::vector<float>& Engine::decode(const std::vector<float>& embeds,
                                         const std::vector<std::vector<std::int64_t>>& positions,
                                         const std::vector<bool>& is_visual,
                                         const std::vector<std::int64_t>& mutual) {
  const auto rows = static_cast<std::int64_t>(is_visual.size());
  require_room(rows);
  std::vector<float> given = embeds;
  std::vector<std::int64_t> places, text_rows, numbers = mutual;
  for (const auto& axis : positions) places.insert(places.end(), axis.begin(), axis.end());
  for (std::int64_t row = 0; row < rows; ++row) {
    if (!is_visual[row]) text_rows.push_back(row);
  }
  if (bundle_.cache.schedule && is_visual.back()) {
    throw Fault("the prompt ends with a picture, and visual rows are dropped before the decoder's "
                "last layer: text must follow it");
  }
  tell_past();
  decode_rows_.BindInput("embeds", floats(given, {1, rows, width_}));
  decode_rows_.BindInput("position_ids",
                         whole_numbers(places, {static_cast<std::int64_t>(axes_), rows}));
  if (bundle_.cache.schedule) {
    const auto count = static_cast<std::int64_t>(text_rows.size());
    decode_rows_.BindInput("text_rows", whole_numbers(text_rows, {count}));
  }
  if (bundle_.cache.mutual_rows) {
    decode_rows_.BindInput("mutual", whole_numbers(numbers, {1, rows}));
  }
  run(decoder_, decode_rows_);
  count_rows(is_visual);
  return logits_;
}

const std::vector<float>& Engine::step(std::int64_t token, std::int64_t position) {
  require_room(1);
  token_[0] = token;
  run(embedding_, embed_step_);
  tell_past();
  std::fill(position_.begin(), position_.end(), position);
  run(decoder_, decode_step_);
  count_rows({false});
  return logits_;
}

void Engine::run(Graph& graph, Ort::IoBinding& binding) {
  try {
    graph.session.Run(Ort::RunOptions(nullptr), binding);
  } catch (const Ort::Exception& error) {
    throw Fault(graph.file + ": ONNX Runtime cannot run it: " + first_line(error.what()));
  }
}

void Engine::require_room(std::int64_t rows) const {
  if (length_ + rows > capacity_) {
    throw Fault("the conversation needs " + std::to_string(length_ + rows) +
                " rows of KV cache; allowed are " + std::to_string(capacity_));
  }
}

// How many rows of earlier calls the layers of every stage hold.
void Engine::tell_past() {
  past_length_[0] = length_;
  for (std::size_t drop = 0; drop < counts_.size(); ++drop) {
    const std::vector<bool>& own = counts_[drop];
    past_stage_lengths_[drop] = std::count(own.begin(), own.begin() + length_, true);
  }
}

// Notes the rows of a call: text counts in every stage, and as many visual rows as are left there.
void Engine::count_rows(const std::vector<bool>& is_visual) {
  const std::int64_t visual = std::count(is_visual.begin(), is_visual.end(), true);
  std::int64_t first = -1, seen = 0;
  for (const bool one : is_visual) {
    if (one && first < 0) first = length_;
    for (std::size_t drop = 0; drop < counts_.size(); ++drop) {
      counts_[drop][length_] = !one || seen < bundle_.cache.schedule->left(drop, visual);
    }
    seen += one;
    ++length_;
  }
  if (first >= 0 && bundle_.cache.schedule && bundle_.cache.schedule->is_ranked()) {
    ranked_.push_back({first, length_});
  }
}

std::int64_t Engine::truncate(std::int64_t length) {
  for (const auto& [first, end] : ranked_) {
    if (first < length && length < end) length = first;
  }
  while (!ranked_.empty() && ranked_.back().second > length) ranked_.pop_back();
  return length_ = length;
}

Ort::Value Engine::whole_numbers(std::vector<std::int64_t>& numbers,
                                 std::vector<std::int64_t> shape) {
  return Ort::Value::CreateTensor<std::int64_t>(memory_, numbers.data(), numbers.size(),
                                                shape.data(), shape.size());
}

Ort::Value Engine::floats(std::vector<float>& numbers, std::vector<std::int64_t> shape) {
  return Ort::Value::CreateTensor<float>(memory_, numbers.data(), numbers.size(), shape.data(),
                                         shape.size());
}

}  // namespace pocketvlm
