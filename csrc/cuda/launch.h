// What every CUDA op needs around its launch: the device guard, torch's current stream, the check.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

namespace cosmos3 {

// The stream is looked up at run time instead of linked, so that this library also loads where
// torch has no CUDA. libtorch_cuda is in the process already whenever a CUDA tensor exists.
inline cudaStream_t current_stream(int32_t device) {
  using Lookup = int32_t (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Lookup>(symbol);
  }();
  if (lookup == nullptr) {
    fail("cosmos3_fast: this torch has no aoti_torch_get_current_cuda_stream in libtorch_cuda.so");
  }
  void* stream = nullptr;
  if (lookup(device, &stream) != 0) {
    fail("cosmos3_fast: torch did not give the current stream of cuda:", device);
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    fail(op, ": CUDA launch failed: ", cudaGetErrorString(error));
  }
}

}  // namespace cosmos3
