// Memory for results, kept from one to the next while a network runs.
//
// malloc maps what is larger than 32 MB anew each time (glibc's M_MMAP_THRESHOLD) and gives it back
// at once, so that the system makes and clears every page of every result. For a clip that was a
// fifth of a CPU's time. Between `keep_memory(true)` and `keep_memory(false)` a thread's results
// come from a pool instead: what a tensor lay in holds a later one as soon as the first is gone.
#include "results.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"

#if defined(__linux__)
// torch has it since 2.11; on an older one it is null, and results come from torch alone.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);
#endif

namespace cosmos3 {
namespace {

// Smaller results are malloc's, which keeps such memory itself.
constexpr size_t kLeast = size_t{1} << 20;

// Ask for pages of 2 MB, of which fewer have to be made than of 4 KB. Only a hint.
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20, least = uintptr_t{32} << 20;
  if (bytes >= least) {
    const auto first = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

struct Chunk {
  void* data;
  size_t bytes;
};

// The chunks that no tensor lies in. One thread takes them; tensors may end in any.
class Pool {
 public:
  ~Pool() {
    close();
  }

  Chunk take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto each = free_.begin(); each != free_.end(); ++each) {
      // Not one that is much larger, whose rest would lie idle.
      const bool fits = each->bytes >= bytes && each->bytes - bytes <= bytes / 4;
      if (fits && (best == free_.end() || each->bytes < best->bytes)) {
        best = each;
      }
    }
    if (best != free_.end()) {
      const Chunk chunk = *best;
      free_.erase(best);
      idle_ -= chunk.bytes;
      lent_ += chunk.bytes;
      return chunk;
    }
    // Those that lie idle go, the longest idle first, until all that there are come to no more than
    // was once lent at the same time, and an eighth: with less, many were made again and again.
    const size_t whole = (bytes + 63) / 64 * 64;
    most_ = std::max(most_, lent_ + whole);
    const size_t most_idle = most_ + most_ / 8 - lent_ - whole;
    drop_idle(most_idle);
    free_.reserve(count_ + 1);  // giving back must not need memory
    void* data = std::aligned_alloc(64, whole);
    if (data == nullptr) {
      drop_idle(0);
      data = std::aligned_alloc(64, whole);
    }
    if (data == nullptr) {
      throw std::bad_alloc();
    }
    prefer_huge_pages(data, whole);
    ++count_;
    lent_ += whole;
    return {data, whole};
  }

  void give_back(const Chunk& chunk) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lent_ -= chunk.bytes;
    if (open_) {
      idle_ += chunk.bytes;
      free_.push_back(chunk);  // whose place take() has seen to
    } else {
      std::free(chunk.data);
    }
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = false;
    drop_idle(0);
  }

 private:
  // The longest idle first, until no more than `most` bytes are.
  void drop_idle(size_t most) {
    auto end = free_.begin();
    for (; end != free_.end() && idle_ > most; ++end) {
      idle_ -= end->bytes;
      --count_;
      std::free(end->data);
    }
    free_.erase(free_.begin(), end);
  }

  std::mutex mutex_;
  bool open_ = true;
  size_t lent_ = 0, idle_ = 0, most_ = 0;  // bytes; the most that were lent
  size_t count_ = 0;                       // chunks, lent and idle
  std::vector<Chunk> free_;
};

thread_local std::shared_ptr<Pool> pool;
thread_local int64_t depth = 0;

// What a tensor's memory goes back to.
struct Lent {
  std::shared_ptr<Pool> pool;
  Chunk chunk;
};

void give_back(void*, void* context) {
  const std::unique_ptr<Lent> lent(static_cast<Lent*>(context));
  lent->pool->give_back(lent->chunk);
}

// Bytes of a tensor, of the dtypes that the ops give; 0: none, or more than there are: torch makes
// it or says why not.
size_t bytes_of(const std::vector<int64_t>& sizes, ScalarType dtype) {
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) {
    if (size <= 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) {
      return 0;
    }
  }
  if (bytes > std::numeric_limits<size_t>::max() / 2) {
    return 0;
  }
  return bytes;
}

// The dimensions of `sizes` lie in memory in the order `dims`.
Tensor new_tensor(const std::vector<int64_t>& sizes, const std::vector<size_t>& dims,
                  ScalarType dtype, torch::headeronly::MemoryFormat format) {
  const size_t bytes = bytes_of(sizes, dtype);
#if defined(__linux__)
  if (pool != nullptr && bytes >= kLeast && torch_from_blob != nullptr) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      strides[*dim] = stride;
      stride *= sizes[*dim];
    }
    auto lent = std::make_unique<Lent>(Lent{pool, pool->take(bytes)});
    const Chunk chunk = lent->chunk;
    AtenTensorHandle made = nullptr;
    if (torch_from_blob(chunk.data, static_cast<int64_t>(sizes.size()), sizes.data(),
                        strides.data(), 0,
                        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                        aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(),
                        nullptr, 0, give_back, lent.get()) == 0) {
      lent.release();  // the tensor's own
      return Tensor(made);
    }
    pool->give_back(chunk);
  }
#endif
  Tensor made = torch::stable::empty(sizes, dtype, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                     std::nullopt, format);
  if (bytes >= kLeast) {
    prefer_huge_pages(made.mutable_data_ptr(), bytes);
  }
  return made;
}

void keep_memory(bool keep) {
  if (keep) {
    if (depth++ == 0) {
      pool = std::make_shared<Pool>();
    }
  } else if (depth > 0 && --depth == 0) {
    pool->close();
    pool.reset();
  }
}

}  // namespace

Tensor new_result(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<size_t> dims(sizes.size());
  std::iota(dims.begin(), dims.end(), 0);
  return new_tensor(sizes, dims, dtype, torch::headeronly::MemoryFormat::Contiguous);
}

Tensor new_image(int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType dtype) {
  return new_tensor({batch, channels, height, width}, {0, 2, 3, 1}, dtype,
                    torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def("keep_memory(bool keep) -> ()");
}

// It has no tensors that would say a device.
STABLE_TORCH_LIBRARY_IMPL(cosmos3, CompositeExplicitAutograd, m) {
  m.impl("keep_memory", TORCH_BOX(&cosmos3::keep_memory));
}
