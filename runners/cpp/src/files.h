// Reading whole files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace pocketvlm {

using Bytes = std::vector<std::uint8_t>;

// The content of a regular file; throws Fault if there is none, or it is larger than allowed.
Bytes read_bytes(const std::filesystem::path& file, std::size_t max_bytes = std::size_t{1} << 29);

}  // namespace pocketvlm
