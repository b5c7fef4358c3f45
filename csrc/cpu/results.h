// Where the results of the CPU kernels lie.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace cosmos3 {

// A contiguous tensor on the CPU, its values not set. While `keep_memory` is on in this thread,
// large ones lie where earlier ones lay that are gone.
torch::stable::Tensor new_result(const std::vector<int64_t>& sizes,
                                 torch::headeronly::ScalarType dtype);

// [batch, channels, height, width] with channels last in memory, likewise.
torch::stable::Tensor new_image(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                torch::headeronly::ScalarType dtype);

}  // namespace cosmos3
