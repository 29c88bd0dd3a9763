#include "device.h"

#include <sys/utsname.h>
#include <unistd.h>
#if defined(__ANDROID__)
#include <dlfcn.h>
#endif
#if defined(__APPLE__)
#include <mach/mach.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "json.h"

namespace pocketvlm {
namespace {

namespace fs = std::filesystem;

constexpr int kBandwidthPasses = 5;
constexpr std::size_t kBandwidthBytes = std::size_t{1} << 28;

// The first line of a file of the system, or nothing.
std::optional<std::string> line_of(const fs::path& file) {
  std::ifstream stream(file);
  std::string line;
  if (!std::getline(stream, line)) return {};
  return line;
}

std::optional<double> number_of(const fs::path& file) {
  const auto line = line_of(file);
  if (!line) return {};
  try {
    return std::stod(*line);
  } catch (const std::exception&) {
    return {};
  }
}

// Bytes that a line such as "VmHWM:   123 kB" states.
std::optional<std::int64_t> stated_bytes(const fs::path& file, const std::string& name) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind(name, 0) != 0) continue;
    std::istringstream words(line.substr(name.size()));
    std::int64_t kibibytes = 0;
    if (words >> kibibytes) return kibibytes * 1024;
  }
  return {};
}

std::vector<fs::path> entries(const fs::path& folder, const std::string& prefix) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (entry.path().filename().string().rfind(prefix, 0) == 0) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::optional<double> hottest_c() {
  std::optional<double> hottest;
  const auto consider = [&](const fs::path& file) {
    const auto value = number_of(file);
    // Thousandths of a degree; sensors that are off state nonsense.
    if (!value || *value <= -40000 || *value >= 150000) return;
    hottest = std::max(hottest.value_or(*value / 1000), *value / 1000);
  };
  for (const auto& zone : entries("/sys/class/thermal", "thermal_zone")) consider(zone / "temp");
  for (const auto& chip : entries("/sys/class/hwmon", "hwmon")) {
    for (const auto& file : entries(chip, "temp")) {
      const std::string name = file.filename().string();
      if (name.size() > 6 && name.compare(name.size() - 6, 6, "_input") == 0) consider(file);
    }
  }
  return hottest;
}

std::optional<int> thermal_status() {
#if defined(__ANDROID__)
  // Android 11 and later; looked up so that the program also starts on older ones.
  void* library = dlopen("libandroid.so", RTLD_NOW);
  if (library == nullptr) return {};
  const auto acquire = reinterpret_cast<void* (*)()>(dlsym(library, "AThermal_acquireManager"));
  const auto release = reinterpret_cast<void (*)(void*)>(dlsym(library, "AThermal_releaseManager"));
  const auto status =
      reinterpret_cast<int (*)(void*)>(dlsym(library, "AThermal_getCurrentThermalStatus"));
  if (acquire == nullptr || release == nullptr || status == nullptr) return {};
  void* manager = acquire();
  if (manager == nullptr) return {};
  const int found = status(manager);
  release(manager);
  if (found >= 0) return found;
#endif
  return {};
}

std::string processor_name(const std::string& machine) {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0) {
      const auto colon = line.find(':');
      if (colon != std::string::npos && colon + 2 < line.size()) return line.substr(colon + 2);
    }
  }
  return machine;
}

std::optional<std::int64_t> last_level_cache_bytes() {
  std::optional<std::int64_t> largest;
  for (const auto& cache : entries("/sys/devices/system/cpu/cpu0/cache", "index")) {
    const auto line = line_of(cache / "size");
    if (!line || line->empty()) continue;
    const auto number = number_of(cache / "size");
    const double scale = line->back() == 'M' ? 1 << 20 : line->back() == 'K' ? 1 << 10 : 1;
    if (number) {
      largest = std::max(largest.value_or(0), static_cast<std::int64_t>(*number * scale));
    }
  }
  return largest;
}

// Bytes per second that threads read together, best of a few passes over more than any cache.
double memory_read_bytes_s(int threads) {
  std::vector<std::uint64_t> array(kBandwidthBytes / sizeof(std::uint64_t), 1);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads));
  double best = 0;
  for (int pass = 0; pass < kBandwidthPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> readers;
    const std::size_t part = array.size() / static_cast<std::size_t>(threads);
    for (std::size_t own = 0; own < sums.size(); ++own) {
      readers.emplace_back([&, own] {
        const auto* first = array.data() + own * part;
        sums[own] = std::accumulate(first, first + part, std::uint64_t{0});
      });
    }
    for (std::thread& reader : readers) reader.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const std::uint64_t sum = std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
    best = std::max(best, static_cast<double>(sum) * sizeof(std::uint64_t) / seconds.count());
  }
  return best;
}

#if defined(__APPLE__)

// What the system holds an app to; compressed pages are in it.
std::optional<task_vm_info_data_t> footprint() {
  task_vm_info_data_t info{};
  mach_msg_type_number_t count = TASK_VM_INFO_COUNT;
  auto* into = reinterpret_cast<task_info_t>(&info);
  if (task_info(mach_task_self(), TASK_VM_INFO, into, &count) != KERN_SUCCESS) return {};
  return info;
}

std::optional<std::int64_t> peak_bytes() {
  const auto info = footprint();
  if (!info) return {};
  return info->ledger_phys_footprint_peak;
}

#else

std::optional<std::int64_t> peak_bytes() { return stated_bytes("/proc/self/status", "VmHWM:"); }

#endif

}  // namespace

#if defined(__APPLE__)

const char* const kMemoryCounter = "phys_footprint";

ProcessMemory process_memory() {
  const auto info = footprint();
  if (!info) return {};
  return {static_cast<std::int64_t>(info->phys_footprint), {}};
}

#else

const char* const kMemoryCounter = "VmHWM";

ProcessMemory process_memory() {
  return {stated_bytes("/proc/self/status", "VmRSS:"),
          stated_bytes("/proc/self/smaps_rollup", "Pss:")};
}

#endif

void PeakMemory::end_phase(const std::string& phase) {
  const auto peak = peak_bytes();
  if (!peak) return;
  std::int64_t& largest = peaks_[phase];
  largest = std::max(largest, *peak);
  std::ofstream reset("/proc/self/clear_refs");
  begins_anew_ = begins_anew_ && reset << "5" && reset.flush();  // see proc(5)
}

std::optional<std::int64_t> PeakMemory::of(const std::string& phase) const {
  const auto found = peaks_.find(phase);
  if (!begins_anew_ || found == peaks_.end()) return {};
  return found->second;
}

std::optional<std::int64_t> PeakMemory::whole() const {
  std::optional<std::int64_t> largest;
  for (const auto& [phase, peak] : peaks_) largest = std::max(largest.value_or(0), peak);
  return largest;
}

Sensors read_sensors() {
  Sensors sensors{hottest_c(), thermal_status(), {}, {}};
  for (const auto& supply : entries("/sys/class/power_supply", "")) {
    if (line_of(supply / "type") != "Battery") continue;
    sensors.battery_percent = number_of(supply / "capacity");
    const auto status = line_of(supply / "status");
    if (status) sensors.is_charging = *status == "Charging" || *status == "Full";
  }
  return sensors;
}

Json to_json(const Sensors& sensors, double at_ms) {
  return {{"at_ms", at_ms},
          {"temperature_c", or_null(sensors.temperature_c)},
          {"thermal_status", or_null(sensors.thermal_status)},
          {"battery_percent", or_null(sensors.battery_percent)},
          {"is_charging", or_null(sensors.is_charging)}};
}

int physical_cores() {
  std::set<std::string> cores;
  for (const auto& cpu : entries("/sys/devices/system/cpu", "cpu")) {
    const auto siblings = line_of(cpu / "topology" / "thread_siblings_list");
    if (siblings) cores.insert(*siblings);
  }
  if (!cores.empty()) return static_cast<int>(cores.size());
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Json describe_environment(int threads, const std::string& runtime_version) {
  utsname system{};
  uname(&system);
  double load = 0;
  const bool has_load = getloadavg(&load, 1) == 1;
  const auto governor = line_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  return {
      {"os", std::string(system.sysname) + " " + system.release},
      {"machine", system.machine},
      {"processor", processor_name(system.machine)},
      {"cores", std::thread::hardware_concurrency()},
      {"ram_bytes", or_null(stated_bytes("/proc/meminfo", "MemTotal:"))},
      {"threads", threads},
      {"runner", "C++"},
      {"toolchain", {{"onnxruntime", runtime_version}}},
      {"load_average_1m", has_load ? Json(std::round(load * 100) / 100) : Json(nullptr)},
      {"governor", or_null(governor)},
      {"temperature_c", or_null(hottest_c())},
      {"memory_read_bytes_s", std::round(memory_read_bytes_s(threads))},
      {"last_level_cache_bytes", or_null(last_level_cache_bytes())},
  };
}

}  // namespace pocketvlm
