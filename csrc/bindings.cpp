// build_info(): what the op library beside this module was built with. The values come from
// setup.py, so the module needs no torch and can still be read when the op library cannot load.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the cosmos3_fast op library was built.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = COSMOS3_FAST_VERSION;
    info["torch"] = COSMOS3_FAST_TORCH;
    info["torch_abi_target"] = COSMOS3_FAST_TORCH_TARGET;
    info["compiler"] = COSMOS3_FAST_COMPILER;
    info["cuda"] = COSMOS3_FAST_CUDA_VERSION;
    info["cuda_architectures"] = COSMOS3_FAST_CUDA_ARCHS;
    info["cxx_flags"] = COSMOS3_FAST_CXX_FLAGS;
    info["nvcc_flags"] = COSMOS3_FAST_NVCC_FLAGS;
    return info;
  });
}
