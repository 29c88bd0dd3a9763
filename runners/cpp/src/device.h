// What this device says of itself: memory of the process, sensors, the machine.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

namespace pocketvlm {

struct ProcessMemory {
  std::optional<std::int64_t> rss_bytes, pss_bytes, peak_rss_bytes;  // the peak is VmHWM
};

ProcessMemory process_memory();

struct Sensors {
  std::optional<double> temperature_c;
  std::optional<int> thermal_status;  // 0 to 6, as Android counts
  std::optional<double> battery_percent;
  std::optional<bool> is_charging;
};

Sensors read_sensors();

// As the line protocol writes a sample.
nlohmann::json to_json(const Sensors& sensors, double at_ms);

// Physical cores, at least 1.
int physical_cores();

// The machine as the line protocol's job `environment` describes it.
nlohmann::json describe_environment(int threads, const std::string& runtime_version);

}  // namespace pocketvlm
