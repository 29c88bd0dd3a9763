// What a user can mend: one line that says what is wrong, where, and what is allowed.
#pragma once

#include <stdexcept>
#include <string>

namespace pocketvlm {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The first line of a library's message.
inline std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace pocketvlm
