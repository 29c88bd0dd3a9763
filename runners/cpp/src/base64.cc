#include "base64.h"

#include "fault.h"

namespace pocketvlm {

Bytes decode_base64(const std::string& text) {
  static const std::string kSigns =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  Bytes bytes;
  bytes.reserve(text.size() / 4 * 3);
  std::uint32_t bits = 0;
  int count = 0;
  for (const char sign : text) {
    if (sign == '=') break;
    const auto value = kSigns.find(sign);
    if (value == std::string::npos) throw Fault("a picture of the job is not base64");
    bits = bits << 6 | static_cast<std::uint32_t>(value);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes.push_back(static_cast<std::uint8_t>(bits >> count));
    }
  }
  return bytes;
}

}  // namespace pocketvlm
