#include "onnx.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <algorithm>
#include <cctype>
#include <memory>
#include <vector>

#include "fault.h"

namespace pocketvlm {
namespace {

std::unique_ptr<Ort::Env> environment;

// Telemetry starts while the library is mapped, so that the variable must be set before. A user
// who has allowed it keeps it, as in the Python package.
void stop_telemetry() {
  constexpr const char* kName = "ORT_DISABLE_TELEMETRY";
  const char* stated = std::getenv(kName);
  std::string value = stated == nullptr ? "" : stated;
  std::transform(value.begin(), value.end(), value.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  for (const char* wanted : {"0", "false", "no", "off"}) {
    if (value == wanted) return;
  }
  setenv(kName, "1", 1);
}

std::vector<std::filesystem::path> candidates(const std::filesystem::path& library) {
  if (!library.empty()) return {library};
  std::vector<std::filesystem::path> found;
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    for (const auto& entry :
         std::filesystem::directory_iterator(program.parent_path(), error)) {
      if (entry.path().filename().string().rfind("libonnxruntime.so", 0) == 0) {
        found.push_back(entry.path());
      }
    }
    std::sort(found.begin(), found.end());
  }
  for (const char* name : {"libonnxruntime.so", "libonnxruntime.so.1", "libonnxruntime.dylib"}) {
    found.emplace_back(name);
  }
  return found;
}

std::vector<int> numbers(const std::string& version) {
  std::vector<int> result;
  for (std::size_t at = 0; at < version.size() && std::isdigit(version[at]) != 0;) {
    int number = 0;
    while (at < version.size() && std::isdigit(version[at]) != 0) {
      number = std::min(number, 1000000) * 10 + (version[at++] - '0');
    }
    result.push_back(number);
    if (at < version.size() && version[at] == '.') ++at;
  }
  while (!result.empty() && result.back() == 0) result.pop_back();
  return result;
}

}  // namespace

std::string open_onnx_runtime(const std::filesystem::path& library) {
  static std::string version;
  if (!version.empty()) return version;
  stop_telemetry();
  // An app may have it in its own program: iOS has it as a static library.
  const bool is_linked = library.empty() && dlsym(RTLD_DEFAULT, "OrtGetApiBase") != nullptr;
  void* handle = is_linked ? RTLD_DEFAULT : nullptr;
  std::string reason;
  for (const auto& path : candidates(library)) {
    if (is_linked || handle != nullptr) break;
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* said = dlerror();
    if (reason.empty() && said != nullptr) reason = said;
  }
  if (!is_linked && handle == nullptr) {
    throw Fault("ONNX Runtime's library cannot be opened (" + first_line(reason) +
                "); put libonnxruntime.so beside this program, or name it by --onnxruntime FILE");
  }
  using GetBase = const OrtApiBase* (*)();
  const auto get_base = reinterpret_cast<GetBase>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw Fault("the library that was opened is not ONNX Runtime's");
  const OrtApi* api = get_base()->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    throw Fault(std::string("ONNX Runtime ") + get_base()->GetVersionString() +
                " is older than 1." + std::to_string(ORT_API_VERSION) +
                ", whose header this program was built with");
  }
  Ort::InitApi(api);
  environment = std::make_unique<Ort::Env>(ORT_LOGGING_LEVEL_ERROR, "pocketvlm");
  environment->DisableTelemetryEvents();
  return version = get_base()->GetVersionString();
}

Ort::Env& onnx_environment() { return *environment; }

bool is_older(const std::string& found, const std::string& lowest) {
  return numbers(found) < numbers(lowest);
}

}  // namespace pocketvlm
