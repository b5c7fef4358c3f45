// Where a result lies in memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cosmos3 {

// Ask for pages of 2 MB under a new, large tensor. An allocator maps what is larger than 32 MB anew
// each time (glibc's M_MMAP_THRESHOLD), and the first use of its 4 KB pages, each of which has to
// be made and cleared, may take longer than what is computed. Only a hint.
inline void prefer_huge_pages(const torch::stable::Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20, least = uintptr_t{32} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(x.numel()) * x.element_size();
  if (bytes >= least) {
    const auto data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
    const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(x);
#endif
}

}  // namespace cosmos3
