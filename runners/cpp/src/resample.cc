// Two passes, each over one axis, with antialiasing. Weights are computed in double precision,
// scaled to whole numbers of 22 bits after the point, and sums are rounded back to eight bits after
// each pass: that is the arithmetic by which Pillow's results are defined.
#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace pocketvlm {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kFractionBits = 32 - 8 - 2;

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

double weight(Filter filter, double x) {
  switch (filter) {
    case Filter::kLanczos:
      return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
    case Filter::kBox:
      return -0.5 < x && x <= 0.5 ? 1.0 : 0.0;
    default:
      break;
  }
  x = std::fabs(x);
  switch (filter) {
    case Filter::kBilinear:
      return x < 1.0 ? 1.0 - x : 0.0;
    case Filter::kHamming:
      if (x == 0.0) return 1.0;
      if (x >= 1.0) return 0.0;
      return std::sin(x * kPi) / (x * kPi) * (0.54 + 0.46 * std::cos(x * kPi));
    default: {
      constexpr double a = -0.5;  // Keys' cubic
      if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
      if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
      return 0.0;
    }
  }
}

double radius(Filter filter) {
  switch (filter) {
    case Filter::kLanczos:
      return 3.0;
    case Filter::kBicubic:
      return 2.0;
    case Filter::kBox:
      return 0.5;
    default:
      return 1.0;
  }
}

// The source pixels of one target pixel: where they start, and their weights.
struct Window {
  int first;
  std::vector<std::int32_t> weights;
};

std::vector<Window> windows(int from, int to, Filter filter) {
  const double scale = static_cast<double>(from) / to;
  const double stretch = std::max(scale, 1.0);
  const double support = radius(filter) * stretch;
  const double inverse = 1.0 / stretch;
  std::vector<Window> result;
  result.reserve(to);
  std::vector<double> exact;
  for (int place = 0; place < to; ++place) {
    const double center = (place + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int end = std::min(static_cast<int>(center + support + 0.5), from);
    exact.clear();
    double total = 0.0;
    for (int at = 0; at < end - first; ++at) {
      exact.push_back(weight(filter, (at + first - center + 0.5) * inverse));
      total += exact.back();
    }
    Window window{first, {}};
    for (double share : exact) {
      if (total != 0.0) share /= total;
      const double scaled = share * (1 << kFractionBits);
      window.weights.push_back(static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
    result.push_back(std::move(window));
  }
  return result;
}

std::uint8_t rounded(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

// One pass: pixels of a window stand `stride` bytes apart.
void mix(const std::uint8_t* source, const Window& window, std::size_t stride,
         std::uint8_t* target) {
  std::int32_t sums[3] = {1 << (kFractionBits - 1), 1 << (kFractionBits - 1),
                          1 << (kFractionBits - 1)};
  const std::uint8_t* pixel = source + window.first * stride;
  for (const std::int32_t share : window.weights) {
    for (int channel = 0; channel < 3; ++channel) sums[channel] += pixel[channel] * share;
    pixel += stride;
  }
  for (int channel = 0; channel < 3; ++channel) target[channel] = rounded(sums[channel]);
}

}  // namespace

namespace {

Picture resize_wide(const Picture& source, int width, Filter filter) {
  if (width == source.width) return source;
  Picture result(width, source.height);
  const auto columns = windows(source.width, width, filter);
  for (int y = 0; y < source.height; ++y) {
    for (int x = 0; x < width; ++x) mix(source.at(0, y), columns[x], 3, result.at(x, y));
  }
  return result;
}

Picture resize_high(const Picture& source, int height, Filter filter) {
  if (height == source.height) return source;
  Picture result(source.width, height);
  const auto lines = windows(source.height, height, filter);
  const std::size_t stride = std::size_t{3} * source.width;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < source.width; ++x) mix(source.at(x, 0), lines[y], stride, result.at(x, y));
  }
  return result;
}

}  // namespace

Picture resize(const Picture& source, int width, int height, Filter filter) {
  // Rounding in between makes the order of the passes show. Pillow 13 begins with the lines where
  // a picture loses more than twice as many of them as columns; earlier versions never do.
  const int lost_lines = source.height - height, lost_columns = source.width - width;
  if (lost_lines > 0 && lost_lines > 2 * lost_columns) {
    return resize_wide(resize_high(source, height, filter), width, filter);
  }
  return resize_high(resize_wide(source, width, filter), height, filter);
}

}  // namespace pocketvlm
