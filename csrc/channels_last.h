// Images in channels-last memory.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace cosmos3 {

inline torch::stable::Tensor channels_last(const torch::stable::Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline torch::stable::Tensor empty_channels_last(const torch::stable::Tensor& like, int64_t batch,
                                                 int64_t channels, int64_t height, int64_t width,
                                                 torch::headeronly::ScalarType dtype) {
  return torch::stable::empty({batch, channels, height, width}, dtype, std::nullopt, like.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace cosmos3
