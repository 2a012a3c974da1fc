// What was built, by which compiler and how. The build passes in what a compiler cannot know.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = __cplusplus;
  info["flags"] = INTROKERNELS_FLAGS;
  info["libraries"] = py::str(INTROKERNELS_LIBRARIES).attr("split")();
  info["torch_built_with"] = INTROKERNELS_TORCH_VERSION;
  info["torch_target_version"] = INTROKERNELS_TORCH_TARGET_VERSION;
  info["python_built_with"] = PY_VERSION;
  info["cuda_compiler"] = INTROKERNELS_CUDA_COMPILER;
  info["cuda_architectures"] = py::str(INTROKERNELS_CUDA_ARCHITECTURES).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How the native libraries of introkernels were built.";
  module.def("build_info", &build_info, "A new dictionary of what was built and how.");
}
