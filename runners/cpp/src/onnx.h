// ONNX Runtime: the one place that includes its header and opens its library.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <filesystem>
#include <string>

namespace pocketvlm {

// Opens ONNX Runtime's shared library once, with its telemetry turned off before it is mapped.
// `library` may be empty: then the one beside this program is taken, or the system's.
// Throws Fault if there is none, or it is too old for the header that this was built with.
// Returns its version.
std::string open_onnx_runtime(const std::filesystem::path& library);

Ort::Env& onnx_environment();

// Whether a version comes before another.
bool is_older(const std::string& found, const std::string& lowest);

}  // namespace pocketvlm
