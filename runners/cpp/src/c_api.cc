#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "conversation.h"
#include "device.h"
#include "fault.h"
#include "onnx.h"
#include "pocketvlm.h"
#include "protocol.h"

namespace {

using namespace pocketvlm;

void tell(char** reason, const std::string& message) {
  if (reason != nullptr) *reason = strdup(one_line(message).c_str());
}

// What a function returns, or what stands for a failure.
template <typename Result, typename Function>
Result guarded(Result failed, char** reason, Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    tell(reason, error.what());
  }
  return failed;
}

std::string text_of(const char* text) { return text == nullptr ? "" : text; }

Bytes bytes_of(const pocketvlm_picture& picture) {
  return Bytes(picture.bytes, picture.bytes + picture.size);
}

}  // namespace

// Members refer to those before them, so that it never moves.
struct pocketvlm_conversation {
  pocketvlm_conversation(Inputs opened, int threads)
      : inputs(std::move(opened)),
        engine(inputs.bundle, threads, default_rows(inputs.bundle)),
        conversation(inputs, engine) {}

  Inputs inputs;
  Engine engine;
  Conversation conversation;
  VisionChoice vision;
};

pocketvlm_conversation* pocketvlm_open(const char* bundle, const char* onnxruntime, int threads,
                                       char** reason) {
  return guarded<pocketvlm_conversation*>(nullptr, reason, [&] {
    Inputs inputs = Inputs::open(text_of(bundle));
    require_greedy(inputs.bundle);
    open_onnx_runtime(text_of(onnxruntime));
    return new pocketvlm_conversation(std::move(inputs), threads > 0 ? threads : physical_cores());
  });
}

int pocketvlm_choose_vision(pocketvlm_conversation* conversation, int visual_tokens, int width,
                            int height, char** reason) {
  return guarded(-1, reason, [&] {
    VisionChoice wanted;
    if (visual_tokens > 0) wanted.visual_tokens = visual_tokens;
    if (width > 0 || height > 0) wanted.resolution = Size{width, height};
    conversation->inputs.choose({1, 1}, wanted);
    conversation->vision = wanted;
    return 0;
  });
}

int pocketvlm_encode_ahead(pocketvlm_conversation* conversation, const pocketvlm_picture* picture,
                           char** reason) {
  return guarded(-1, reason, [&] {
    conversation->conversation.encode_ahead(bytes_of(*picture), conversation->vision);
    return 0;
  });
}

int pocketvlm_ask(pocketvlm_conversation* conversation, const char* rendered,
                  const pocketvlm_picture* pictures, size_t count, int max_new_tokens,
                  pocketvlm_piece on_piece, void* context, char** reason) {
  const int status = guarded(-1, reason, [&] {
    if (max_new_tokens < 1) throw Fault("max_new_tokens must be at least 1");
    Question question{text_of(rendered), {}, conversation->vision};
    for (size_t i = 0; i < count; ++i) {
      question.pictures.push_back(bytes_of(pictures[i]));
    }
    conversation->conversation.ask(question, {max_new_tokens, false}, [&](const std::string& piece) {
      if (on_piece != nullptr) on_piece(piece.c_str(), context);
    });
    return 0;
  });
  if (status != 0) conversation->conversation.reset();
  return status;
}

void pocketvlm_reset(pocketvlm_conversation* conversation) { conversation->conversation.reset(); }

void pocketvlm_close(pocketvlm_conversation* conversation) { delete conversation; }

int pocketvlm_run_job(const char* job, const char* onnxruntime, int descriptor) {
  std::FILE* out = fdopen(dup(descriptor), "w");
  if (out == nullptr) return 2;
  const int status = run_job(text_of(job), text_of(onnxruntime), out);
  std::fclose(out);
  return status;
}

void pocketvlm_free(char* reason) { std::free(reason); }
