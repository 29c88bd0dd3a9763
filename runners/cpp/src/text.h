// Text as code points, and the classes of characters that tokenizers ask for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pocketvlm {

using Codes = std::vector<char32_t>;

// UTF-8 to code points; throws Fault if it is not valid.
Codes decode_utf8(std::string_view text);

void append_utf8(std::string& text, char32_t code);

// Bytes as UTF-8, with U+FFFD for what is none.
std::string decode_lossy(std::string_view bytes);

bool is_letter(char32_t code);
bool is_number(char32_t code);
bool is_space(char32_t code);

// Whether the text is known to be in Unicode's normal form C (the quick check of UAX 15).
bool is_normal_form_c(const Codes& text);

// Without white space at the ends.
std::string strip(const std::string& text);

}  // namespace pocketvlm
