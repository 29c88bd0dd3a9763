// The line protocol: one JSON job in, events and one JSON result out.
#pragma once

#include <cstdio>
#include <string>

namespace pocketvlm {

// Does the job that a document states with the ONNX Runtime of a file (or, if its name is empty,
// the one that is found), writes events as they happen and the result as the last
// line; returns the exit status, 0 with a result and 2 with a reason.
int run_job(const std::string& document, const std::string& library, std::FILE* out);

// A message on one line, whatever names it holds: control characters are written as \xNN.
std::string one_line(const std::string& message);

}  // namespace pocketvlm
