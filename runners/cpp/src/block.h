// One block: load a bundle, answer a workload again and again, and time every stage.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "conversation.h"
#include "json.h"

namespace pocketvlm {

struct BlockJob {
  std::string bundle;
  std::vector<Question> turns;
  Limits limits;
  int warm_ups = 1, answers = 1, threads = 1;
  std::optional<double> sustained_s;
};

// Reads a job of the line protocol; throws Fault for what is missing, or not this runner's.
BlockJob read_block_job(const Json& document);

using Emit = std::function<void(const Json&)>;

// The protocol's `Block`; `emit` is called with every event.
Json measure_block(const BlockJob& job, const Emit& emit);

}  // namespace pocketvlm
