// JSON documents of a bundle.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "fault.h"

namespace pocketvlm {

using Json = nlohmann::json;

// The JSON document in a file; throws Fault with the file's name.
Json read_json(const std::filesystem::path& file);

// Calls a reader of a document; whatever it refuses, or JSON's library says of a wrong type, becomes
// a Fault that names the file.
template <typename Reader>
auto reading(const std::filesystem::path& file, Reader reader) {
  try {
    return reader();
  } catch (const Json::exception& error) {
    throw Fault(file.string() + ": " + first_line(error.what()));
  } catch (const Fault& fault) {
    throw Fault(file.string() + ": " + fault.what());
  }
}

// A value, or null.
template <typename Value>
Json or_null(const std::optional<Value>& value) {
  return value ? Json(*value) : Json(nullptr);
}

}  // namespace pocketvlm
