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

// Rows of a long call that are run at once; the Python runner has the same number.
constexpr std::int64_t kPrefillPieceRows = 128;

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

struct ElementType {
  ONNXTensorElementDataType type;
  std::size_t bytes;
};

ElementType element_type(const std::string& dtype) {
  if (dtype == "int8") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1};
  if (dtype == "uint8") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1};
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
  // Before anything else takes memory: a layer is several times its size while it is made.
  if (bundle.has("prefill")) make_weights(threads);
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
  if (bundle.has("prefill")) {
    prefill_ = load(bundle.component("prefill"), threads);
    prefill_rows_ = bind_cache(prefill_);
    for (const Buffer& made : made_) prefill_rows_.BindInput(made.name.c_str(), made.value);
    least_prefill_rows_ = bundle.component("prefill").least_rows;
  }
}

Engine::Graph Engine::load(const Component& component, int threads) const {
  Graph graph{(bundle_.path / component.file).string(), component.variant};
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.SetInterOpNumThreads(1);
  options.SetIntraOpNumThreads(threads);
  require_exact_sums(options);
  const std::string& role = component.role;
  // Their threads must not spin while the decoder's work.
  if (role == "vision" || role == "prefill" || role == "unpack") {
    options.AddConfigEntry("session.force_spinning_stop", "1");
  }
  // They run once per picture, or once, and give back their activations: nothing is kept for them.
  if (role == "vision" || role == "unpack") options.DisableMemPattern();
  if (role == "unpack") options.DisableCpuMemArena();
  // All of its inputs are constant. Folded, every step of every layer would be held at once.
  if (role == "unpack") options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);
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
  for (const Signature& input : decoder.inputs) {
    if (!is_cache(input.name)) continue;
    cache_.push_back(allocate(input.name.substr(kPast.size()),
                              {1, input.fixed(1), capacity_, input.fixed(3)},
                              bundle_.cache.dtype));
  }
}

Engine::Buffer Engine::allocate(const std::string& name, const std::vector<std::int64_t>& shape,
                                const std::string& dtype) const {
  const auto [type, bytes] = element_type(dtype);
  std::size_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
  // Unused capacity costs no memory.
  Buffer buffer{name, fresh_zeros(count * bytes)};
  if (!buffer.memory) {
    throw Fault(name + ": " + std::to_string(count * bytes) + " bytes do not fit into memory");
  }
  buffer.value = Ort::Value::CreateTensor(memory_, buffer.memory.get(), count * bytes,
                                          shape.data(), shape.size(), type);
  return buffer;
}

// Makes the weights of the graph for long calls out of the decoder's, once.
void Engine::make_weights(int threads) {
  Graph unpack = load(bundle_.component("unpack"), threads);
  Ort::IoBinding binding(unpack.session);
  for (const Signature& output : bundle_.component("unpack").outputs) {
    // Products of int8 codes, where they are not constant, saturate on x86 without VNNI.
    if (output.dtype != "uint8" && output.dtype != "float32") {
      throw Fault(unpack.file + ": makes " + output.name + " as " + output.dtype +
                  "; types must be uint8 or float32");
    }
    std::vector<std::int64_t> shape;
    for (std::size_t at = 0; at < output.shape.size(); ++at) shape.push_back(output.fixed(at));
    made_.push_back(allocate(output.name, shape, output.dtype));
    binding.BindOutput(output.name.c_str(), made_.back().value);
  }
  run(unpack, binding);
  binding = Ort::IoBinding(nullptr);
  unpack.session = Ort::Session(nullptr);
  return_freed_memory();
}

Ort::IoBinding Engine::bind_decoder() {
  Ort::IoBinding binding = bind_cache(decoder_);
  if (bundle_.cache.schedule) {
    const auto drops = static_cast<std::int64_t>(past_stage_lengths_.size());
    binding.BindInput("past_stage_lengths", whole_numbers(past_stage_lengths_, {drops}));
  }
  const auto vocabulary = static_cast<std::int64_t>(logits_.size());
  binding.BindOutput("logits", floats(logits_, {1, 1, vocabulary}));
  return binding;
}

Ort::IoBinding Engine::bind_cache(Graph& graph) {
  Ort::IoBinding binding(graph.session);
  binding.BindInput("past_length", whole_numbers(past_length_, {1}));
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
    Ort::RunOptions options;
    // Without an arena glibc keeps pieces between activations, and the peak is nearly twice as high.
    options.AddConfigEntry("memory.enable_memory_arena_shrinkage", "cpu:0");
    auto results = vision_.session.Run(options, inputs, &value, 1, outputs, 2);
    return_freed_memory();
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
  const auto count = static_cast<std::int64_t>(is_visual.size());
  require_room(count);
  if (bundle_.cache.schedule && is_visual.back()) {
    throw Fault("the prompt ends with a picture, and visual rows are dropped before the decoder's "
                "last layer: text must follow it");
  }
  const auto part = [&](std::int64_t from, std::int64_t end) {
    Rows rows;
    rows.count = end - from;
    rows.embeds.assign(embeds.begin() + from * width_, embeds.begin() + end * width_);
    for (const auto& axis : positions) {
      rows.places.insert(rows.places.end(), axis.begin() + from, axis.begin() + end);
    }
    for (std::int64_t row = from; row < end; ++row) {
      if (!is_visual[row]) rows.text.push_back(row - from);
    }
    if (!mutual.empty()) rows.mutual.assign(mutual.begin() + from, mutual.begin() + end);
    return rows;
  };
  tell_past();
  // The graph for long calls leaves the last row, whose logits are wanted, to the decoder. Rows run
  // in pieces, as none of a piece looks at later ones: what attention and the widest products take
  // grows with them. Those that see each other, or that a schedule drops, are not parted.
  const bool is_seen = !mutual.empty() && mutual.back() >= 0;
  const bool is_long = least_prefill_rows_ > 0 && count >= least_prefill_rows_ && !is_seen;
  const bool is_whole = bundle_.cache.mutual_rows || bundle_.cache.schedule;
  const std::int64_t piece = is_whole ? count : kPrefillPieceRows;
  const std::int64_t filled = is_long ? count - 1 : (count - 1) / piece * piece;
  for (std::int64_t start = 0; start < filled; start += piece) {
    Rows before = part(start, std::min(start + piece, filled));
    run_rows(is_long ? prefill_ : decoder_, is_long ? prefill_rows_ : decode_rows_, before);
    past_length_[0] += before.count;
  }
  Rows rest = part(filled, count);
  run_rows(decoder_, decode_rows_, rest);
  count_rows(is_visual);
  return logits_;
}

void Engine::run_rows(Graph& graph, Ort::IoBinding& binding, Rows& rows) {
  binding.BindInput("embeds", floats(rows.embeds, {1, rows.count, width_}));
  binding.BindInput("position_ids", whole_numbers(rows.places, {static_cast<std::int64_t>(axes_),
                                                                rows.count}));
  if (bundle_.cache.schedule) {
    const auto text = static_cast<std::int64_t>(rows.text.size());
    binding.BindInput("text_rows", whole_numbers(rows.text, {text}));
  }
  if (bundle_.cache.mutual_rows) {
    binding.BindInput("mutual", whole_numbers(rows.mutual, {1, rows.count}));
  }
  run(graph, binding);
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
