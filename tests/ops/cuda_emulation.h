// csrc/cuda/launch.h for a C++ compiler: a launch calls the kernel once per thread, and the threads
// of all blocks come in one shuffled order. No kernel waits for another thread, so none needs a
// stack of its own; one that does (__syncthreads, a shuffle, shared memory) does not compile here.
//
// The ops are registered under a namespace of their own, for CPU tensors. With COSMOS3_TRACED,
// compiled by clang with -fsanitize-coverage=trace-loads,trace-stores, every access
// of a kernel to memory that is not its own stack is recorded.
#pragma once

#include <cuda_runtime.h>
#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

#include "checks.h"

#define COSMOS3_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(cosmos3_emulated, CPU, m)
#define EMULATION_API extern "C" __attribute__((visibility("default"), used))
#ifdef COSMOS3_TRACED
#define EMULATION_UNTRACED __attribute__((no_sanitize("coverage")))
#else
#define EMULATION_UNTRACED
#endif

static dim3 gridDim, blockDim;
static uint3 blockIdx, threadIdx;

namespace emulation {

struct Access {
  uint64_t address;
  uint32_t size, is_store, thread, launch;
};

inline std::mt19937 order(0);
inline std::vector<Access> accesses;
inline bool recording = false;
inline uint32_t thread = 0, launches = 0;
inline uintptr_t stack_begin = 0, stack_end = 0;

EMULATION_UNTRACED inline void find_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  stack_begin = reinterpret_cast<uintptr_t>(begin);
  stack_end = stack_begin + size;
}

EMULATION_UNTRACED inline void record(void* pointer, uint32_t size, bool is_store) {
  if (!recording) {
    return;
  }
  recording = false;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const void* ours[] = {&gridDim, &blockDim, &blockIdx, &threadIdx, &recording};
  const bool is_ours = std::any_of(std::begin(ours), std::end(ours), [&](const void* variable) {
    return address - reinterpret_cast<uintptr_t>(variable) < sizeof(dim3);
  });
  if (!is_ours && !(stack_begin <= address && address < stack_end)) {
    accesses.push_back({address, size, is_store, thread, launches});
  }
  recording = true;
}

}  // namespace emulation

EMULATION_API void emulation_seed(uint32_t seed) {
  emulation::order.seed(seed);
}

EMULATION_API uint32_t emulation_launches() {
  return emulation::launches;
}

// The accesses since the last call, until the next one.
EMULATION_API size_t emulation_accesses(const emulation::Access** begin) {
  static std::vector<emulation::Access> taken;
  taken.clear();
  taken.swap(emulation::accesses);
  *begin = taken.data();
  return taken.size();
}

#ifdef COSMOS3_TRACED
#define EMULATION_CALLBACKS(size)                                              \
  EMULATION_API EMULATION_UNTRACED void __sanitizer_cov_load##size(void* p) {  \
    emulation::record(p, size, false);                                         \
  }                                                                            \
  EMULATION_API EMULATION_UNTRACED void __sanitizer_cov_store##size(void* p) { \
    emulation::record(p, size, true);                                          \
  }
EMULATION_CALLBACKS(1)
EMULATION_CALLBACKS(2)
EMULATION_CALLBACKS(4)
EMULATION_CALLBACKS(8)
EMULATION_CALLBACKS(16)
// Clang traces accesses only where it also traces blocks.
EMULATION_API EMULATION_UNTRACED void __sanitizer_cov_trace_pc() {}
#endif

namespace cosmos3 {

// One load or store of 16 bytes, as on a device; a struct's copy is a memcpy, which is not traced.
using uint4 = unsigned __attribute__((vector_size(16), may_alias));

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) {
  return nullptr;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            cudaStream_t, const Arguments&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "kernel parameters end at 4 KiB");
  // What a device refuses.
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535 || threads > 1024) {
    fail(op, ": CUDA launch failed: invalid configuration argument");
  }
  gridDim = grid;
  blockDim = dim3(threads);
  ++emulation::launches;
  emulation::find_stack();
  std::vector<uint32_t> order(uint64_t{grid.x} * grid.y * grid.z * threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), emulation::order);
  for (const uint32_t index : order) {
    const uint32_t block = index / threads;
    threadIdx = {index % threads, 0, 0};
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    emulation::thread = index;
    emulation::recording = true;
    // Callbacks are inserted last: the optimizer must not know that nobody reads these in between.
    asm volatile("" ::: "memory");
    kernel(arguments...);
    asm volatile("" ::: "memory");
    emulation::recording = false;
  }
}

}  // namespace cosmos3
