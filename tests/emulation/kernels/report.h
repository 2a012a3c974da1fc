// How tests call what launches kernels, from Python.
#pragma once

#include <exception>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What work throws, as text that holds until the next call; null where it throws nothing.
template <typename Work>
const char* report_of(const Work& work) {
  static std::string report;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
}
