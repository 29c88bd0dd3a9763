#include "protocol.h"

#include <cstdint>

#include "block.h"
#include "device.h"
#include "fault.h"
#include "onnx.h"

namespace pocketvlm {
namespace {

constexpr int kProtocol = 3;

void write_line(const Json& document, std::FILE* out) {
  const std::string line = document.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  std::fwrite(line.data(), 1, line.size(), out);
  std::fflush(out);
}

Json result_of(const Json& job, const std::string& library, const Emit& emit) {
  if (!job.is_object() || job.value("schema", Json()) != kProtocol) {
    const Json schema = job.is_object() ? job.value("schema", Json()) : Json();
    throw Fault("job schema " + schema.dump() + "; this runner speaks " + std::to_string(kProtocol));
  }
  const std::string kind = job.at("job");
  if (kind == "environment") {
    const Json threads = job.value("threads", Json());
    const int count = threads.is_null() ? physical_cores() : threads.get<int>();
    if (count < 1) throw Fault("job: threads must be at least 1");
    return describe_environment(count, open_onnx_runtime(library));
  }
  if (kind == "sensors") return to_json(read_sensors(), 0);
  if (kind == "block") {
    const BlockJob block = read_block_job(job);
    open_onnx_runtime(library);
    return measure_block(block, emit);
  }
  throw Fault("job " + kind + "; this runner knows environment, sensors and block");
}

}  // namespace

std::string one_line(const std::string& message) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string line;
  for (const char sign : message) {
    const auto byte = static_cast<unsigned char>(sign);
    if (byte >= 0x20 && byte != 0x7F) {
      line += sign;
    } else {
      line += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return line;
}

int run_job(const std::string& document, const std::string& library, std::FILE* out) {
  std::string reason;
  try {
    const Json result = result_of(Json::parse(document), library,
                                  [out](const Json& event) { write_line(event, out); });
    write_line({{"schema", kProtocol}, {"status", "ok"}, {"result", result}}, out);
    return 0;
  } catch (const Json::exception& error) {
    reason = "the job is not valid: " + one_line(error.what());
  } catch (const std::bad_alloc&) {
    reason = "memory ran out";
  } catch (const std::exception& error) {
    reason = one_line(error.what());
  }
  write_line({{"schema", kProtocol}, {"status", "failed"}, {"reason", reason}}, out);
  return 2;
}

}  // namespace pocketvlm
