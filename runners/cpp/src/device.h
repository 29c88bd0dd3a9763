// What this device says of itself: memory of the process, sensors, the machine.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

namespace pocketvlm {

// What memory is counted by, in the words of the line protocol.
extern const char* const kMemoryCounter;

struct ProcessMemory {
  std::optional<std::int64_t> rss_bytes, pss_bytes;
};

ProcessMemory process_memory();

// Peaks of this process's memory by phase.
class PeakMemory {
 public:
  // A phase has ended; the next one's peak begins at what is resident then.
  void end_phase(const std::string& phase);

  // The largest of all phases of this name; nothing where the system cannot begin a peak anew.
  std::optional<std::int64_t> of(const std::string& phase) const;

  // The largest of all.
  std::optional<std::int64_t> whole() const;

 private:
  std::map<std::string, std::int64_t> peaks_;
  bool begins_anew_ = true;
};

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
