#pragma once

#include <string>

#include "files.h"

namespace pocketvlm {

// Throws Fault for a sign that is none of base64's.
Bytes decode_base64(const std::string& text);

}  // namespace pocketvlm
