#include "files.h"

#include <fstream>

#include "json.h"

namespace pocketvlm {

Bytes read_bytes(const std::filesystem::path& file, std::size_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error)) {
    throw Fault(file.string() + ": no such file");
  }
  const auto size = std::filesystem::file_size(file, error);
  if (error || size > max_bytes) {
    throw Fault(file.string() + ": larger than the " + std::to_string(max_bytes) +
                " bytes that are allowed, or unreadable");
  }
  Bytes content(size);
  std::ifstream stream(file, std::ios::binary);
  if (!stream.read(reinterpret_cast<char*>(content.data()), static_cast<std::streamsize>(size))) {
    throw Fault(file.string() + ": cannot be read");
  }
  return content;
}

Json read_json(const std::filesystem::path& file) {
  const Bytes content = read_bytes(file);
  return reading(file, [&] { return Json::parse(content.begin(), content.end()); });
}

}  // namespace pocketvlm
