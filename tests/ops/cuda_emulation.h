// csrc/cuda/launch.h for a C++ compiler: a launch calls the kernel once per thread, and the threads
// of all blocks come in one shuffled order. Where threads exchange values within their warp
// (launch_warps) or their block (launch_blocks), the warps or blocks come in a shuffled order, and
// the threads of one are fibers that take turns in one: each runs until it waits for the others
// of its warp, and warps go on by themselves up to a barrier.
// Shared memory comes from shared_memory() alone, and is poisoned before each block.
//
// The ops are registered under a namespace of their own, for CPU tensors. With COSMOS3_TRACED,
// compiled by clang with -fsanitize-coverage=trace-loads,trace-stores, every access
// of a kernel to memory that is not its own stack is recorded.
#pragma once

#include <cuda_runtime.h>
#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
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

#undef __launch_bounds__
#define __launch_bounds__(...)

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

// The memory that the threads of a block share, and how much of it a kernel has asked for.
alignas(16) inline std::array<char, 48 * 1024> shared;
inline size_t asked = 0;
// Whether the kernel is one that was launched with launch_blocks.
inline bool shares = false;

constexpr uint32_t kWarp = 32;

// The threads of a warp or of a block, each with a stack of its own.
struct Team {
  static constexpr size_t kStack = 128 * 1024;
  static constexpr uint32_t kMost = 1024;

  explicit Team(uint32_t threads) : size(threads), stacks(threads * kStack) {}

  uint32_t size;
  std::vector<char> stacks;
  std::array<ucontext_t, kMost> fibers;
  std::array<bool, kMost> is_done;
  std::array<uint32_t, kMost> exchanges, barriers;  // that each thread has entered
  // What each thread offers to the others, for this exchange and the next one.
  std::array<std::array<uint64_t, kMost>, 2> offered;
  ucontext_t scheduler;
  uint32_t current = 0;
  std::function<void()> body;

  EMULATION_UNTRACED static void run_current();

  // Whether an address is of this object or on one of the stacks.
  EMULATION_UNTRACED bool holds(uintptr_t address) const {
    auto within = [address](const void* begin, size_t bytes) {
      return address - reinterpret_cast<uintptr_t>(begin) < bytes;
    };
    return within(this, sizeof(Team)) || within(stacks.data(), stacks.size()) ||
           within(shared.data(), shared.size());
  }

  // Runs `body` as each of its threads, having called `enter` whenever one goes on. Returns
  // whether all of them met in the same exchanges.
  template <typename Enter>
  EMULATION_UNTRACED bool run(const Enter& enter) {
    for (uint32_t lane = 0; lane < size; ++lane) {
      getcontext(&fibers[lane]);
      fibers[lane].uc_stack.ss_sp = stacks.data() + lane * kStack;
      fibers[lane].uc_stack.ss_size = kStack;
      fibers[lane].uc_link = &scheduler;
      makecontext(&fibers[lane], &Team::run_current, 0);
    }
    is_done.fill(false);
    exchanges.fill(0);
    barriers.fill(0);
    shared.fill(-1);  // NaN
    // Warps that have not come to the next barrier. One of them goes on for a while, or up to
    // there.
    std::vector<uint32_t> warps(size / kWarp), turns(kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(turns.begin(), turns.end(), 0);
    uint32_t passed = 0;
    while (!warps.empty()) {
      const size_t which = order() % warps.size();
      const uint32_t first = warps[which] * kWarp;
      const bool goes_far = order() % 2;
      do {
        std::shuffle(turns.begin(), turns.end(), order);
        for (const uint32_t lane : turns) {
          current = first + lane;
          enter(current);
          recording = true;
          swapcontext(&scheduler, &fibers[current]);
          recording = false;
        }
        for (uint32_t lane = first + 1; lane < first + kWarp; ++lane) {
          if (is_done[lane] != is_done[first] || exchanges[lane] != exchanges[first] ||
              barriers[lane] != barriers[first]) {
            return false;
          }
        }
      } while (goes_far && !is_done[first] && barriers[first] == passed);
      if (is_done[first] || barriers[first] > passed) {
        warps.erase(warps.begin() + which);
      }
      if (warps.empty() && !is_done[first]) {  // all wait there
        ++passed;
        for (uint32_t warp = 0; warp < size / kWarp; ++warp) {
          if (barriers[warp * kWarp] != passed) {
            return false;
          }
          warps.push_back(warp);
        }
      }
    }
    if (std::any_of(shared.begin() + asked, shared.end(), [](char byte) { return byte != -1; })) {
      cosmos3::fail("a thread writes beyond the memory that its block shares");
    }
    return std::all_of(barriers.begin(), barriers.begin() + size,
                       [passed](uint32_t entered) { return entered == passed; });
  }

  // What the thread `partner` offers in the same exchange.
  template <typename T>
  EMULATION_UNTRACED T exchange(T value, uint32_t partner) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    recording = false;
    auto& board = offered[exchanges[current]++ % 2];
    std::memcpy(&board[current], &value, sizeof(T));
    swapcontext(&fibers[current], &scheduler);
    recording = false;
    std::memcpy(&value, &board[partner], sizeof(T));
    recording = true;
    return value;
  }

  EMULATION_UNTRACED void barrier() {
    recording = false;
    ++barriers[current];
    swapcontext(&fibers[current], &scheduler);
    recording = true;
  }
};

inline Team* team = nullptr;  // the one that runs

EMULATION_UNTRACED inline void record(void* pointer, uint32_t size, bool is_store) {
  if (!recording) {
    return;
  }
  recording = false;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const void* ours[] = {&gridDim,   &blockDim, &blockIdx, &threadIdx,
                        &recording, &team,     &shares,   &asked};
  const bool is_ours = std::any_of(std::begin(ours), std::end(ours), [&](const void* variable) {
    return address - reinterpret_cast<uintptr_t>(variable) < sizeof(dim3);
  });
  if (!is_ours && !(stack_begin <= address && address < stack_end) &&
      !(team != nullptr && team->holds(address))) {
    accesses.push_back({address, size, is_store, thread, launches});
  }
  recording = true;
}

EMULATION_UNTRACED inline void Team::run_current() {
  // Callbacks are inserted last: the optimizer must not know that nobody reads these in between.
  asm volatile("" ::: "memory");
  team->body();
  asm volatile("" ::: "memory");
  recording = false;
  team->is_done[team->current] = true;
}

}  // namespace emulation

template <typename T>
EMULATION_UNTRACED T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (emulation::team == nullptr || mask != 0xffffffffu) {
    cosmos3::fail("a warp's threads exchange values only together, and below launch_warps");
  }
  return emulation::team->exchange(value, emulation::team->current ^ lane_mask);
}

EMULATION_UNTRACED inline void __syncthreads() {
  if (emulation::team == nullptr || !emulation::shares) {
    cosmos3::fail("a block's threads wait for each other only below launch_blocks");
  }
  emulation::team->barrier();
}

inline float quick_exp(float x) {
  return std::exp(x);
}
inline float quick_reciprocal(float x) {
  return 1 / x;
}
inline float quick_reciprocal_root(float x) {
  return 1 / std::sqrt(x);
}

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

template <typename... Parameters>
void begin_launch(const char* op, dim3 grid, unsigned threads) {
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
}

// The thread `index` of all of a launch is the one that runs from here on.
inline void enter_thread(uint32_t index) {
  const uint32_t block = index / blockDim.x;
  threadIdx = {index % blockDim.x, 0, 0};
  blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
  emulation::thread = index;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            cudaStream_t, const Arguments&... arguments) {
  begin_launch<Parameters...>(op, grid, threads);
  std::vector<uint32_t> order(uint64_t{grid.x} * grid.y * grid.z * threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), emulation::order);
  for (const uint32_t index : order) {
    enter_thread(index);
    emulation::recording = true;
    // Callbacks are inserted last: the optimizer must not know that nobody reads these in between.
    asm volatile("" ::: "memory");
    kernel(arguments...);
    asm volatile("" ::: "memory");
    emulation::recording = false;
  }
}

// Launches whose threads meet in teams of `size`, of a warp or of a block.
template <typename... Parameters, typename... Arguments>
void launch_teams(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  uint32_t size, const Arguments&... arguments) {
  begin_launch<Parameters...>(op, grid, threads);
  static std::map<uint32_t, emulation::Team> teams;
  emulation::Team& team = teams.try_emplace(size, size).first->second;
  emulation::team = &team;
  team.body = [&] { kernel(arguments...); };
  std::vector<uint32_t> order(uint64_t{grid.x} * grid.y * grid.z * threads / size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), emulation::order);
  bool met = threads % emulation::kWarp == 0;
  for (const uint32_t each : order) {
    met = met && team.run([&](uint32_t lane) { enter_thread(each * size + lane); });
  }
  emulation::team = nullptr;
  if (!met) {
    fail(op, ": the threads of a warp or block do not meet in the same exchanges");
  }
}

template <typename... Parameters, typename... Arguments>
void launch_warps(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  cudaStream_t, const Arguments&... arguments) {
  emulation::shares = false;
  launch_teams(op, kernel, grid, threads, emulation::kWarp, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch_blocks(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   cudaStream_t, const Arguments&... arguments) {
  emulation::shares = true;
  emulation::asked = 0;
  launch_teams(op, kernel, grid, threads, threads, arguments...);
}

template <typename T, int n>
EMULATION_UNTRACED T* shared_memory() {
  static_assert(n * sizeof(T) <= sizeof(emulation::shared), "a block shares at most 48 KiB");
  emulation::asked = std::max(emulation::asked, n * sizeof(T));
  return reinterpret_cast<T*>(emulation::shared.data());
}

}  // namespace cosmos3
