// What every CUDA op needs around its launch: the device guard, torch's current stream, the launch
// and its check, the registration. Where COSMOS3_EMULATED is defined, tests/ops/cuda_emulation.h
// gives the same names to a C++ compiler, and the kernels run on the CPU.
#pragma once

#ifdef COSMOS3_EMULATED
#include "cuda_emulation.h"
#else

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

#define COSMOS3_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(cosmos3, CUDA, m)

namespace cosmos3 {

using torch::stable::accelerator::DeviceGuard;

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

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            cudaStream_t stream, const Arguments&... arguments) {
  // clang-format off: in a header it takes the last bracket for an operator
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    fail(op, ": CUDA launch failed: ", cudaGetErrorString(error));
  }
}

// To about 2^-22 of the result, in an instruction or two each.
__device__ inline float quick_exp(float x) {
  return __expf(x);
}
__device__ inline float quick_reciprocal(float x) {
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float quick_reciprocal_root(float x) {
  return rsqrtf(x);
}

// Of a kernel whose threads exchange values within their warp, which an emulation has to know.
template <typename... Parameters, typename... Arguments>
void launch_warps(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  cudaStream_t stream, const Arguments&... arguments) {
  launch(op, kernel, grid, threads, stream, arguments...);
}

// Of a kernel whose threads exchange values within their block.
template <typename... Parameters, typename... Arguments>
void launch_blocks(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   cudaStream_t stream, const Arguments&... arguments) {
  launch(op, kernel, grid, threads, stream, arguments...);
}

// n values that the threads of a block share: the same ones wherever a kernel asks for a T.
template <typename T, int n>
__device__ T* shared_memory() {
  __shared__ T memory[n];
  return memory;
}

}  // namespace cosmos3

#endif

#include <algorithm>

namespace cosmos3 {

// (blocks along a row, rows, batch entries), so that no index takes a division; y and z of a grid
// end at 65535, beyond which a block takes further rows and batch entries: `for_each_row`.
inline dim3 grid_of_rows(int64_t batch, int64_t rows, int64_t threads_of_row, unsigned threads) {
  auto clamped = [](int64_t size) { return static_cast<unsigned>(std::min<int64_t>(size, 65535)); };
  return dim3(static_cast<unsigned>((threads_of_row + threads - 1) / threads), clamped(rows),
              clamped(batch));
}

template <typename F>
__device__ void for_each_row(int64_t batch, int64_t rows, F&& f) {
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
      f(b, row);
    }
  }
}

// Of this thread, along a row.
__device__ inline int64_t index_in_row() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

}  // namespace cosmos3
