// The schema of every op in the library. Each backend registers its kernels beside their code:
// cpu/<op>.cpp and cuda/<op>.cu; cosmos3_fast/ops/<op>.py adds the fake
// kernel, autograd and Triton.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cosmos3, m) {
  m.def(
      "prepare_latents(Tensor cond_latent, Tensor noise, int[] condition_frames=[0]) -> "
      "(Tensor latents, Tensor velocity_mask)");
  m.def(
      "prepare_latents.mask(Tensor cond_latent, Tensor noise, Tensor condition_mask) -> "
      "(Tensor latents, Tensor velocity_mask)");
  m.def(
      "prepare_latents_(Tensor cond_latent, Tensor(a!) noise, int[] condition_frames=[0]) -> "
      "Tensor velocity_mask");
  m.def(
      "rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
      "Tensor? residual=None) -> Tensor");
  m.def(
      "add_rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor sum, Tensor activated)");
  m.def("add_pad(Tensor x, Tensor? bias=None, Tensor? residual=None, bool pad=True) -> Tensor");
  m.def("pack_pixels(Tensor pixels, int patch_size, ScalarType dtype, int channels=0) -> Tensor");
  m.def("unpack_pixels(Tensor x, int patch_size, bool as_bytes=False) -> Tensor");
  m.def(
      "resize_crop(Tensor image, int[2] size, int[4] crop, str filter, bool vertical_first=False) "
      "-> "
      "Tensor");
  m.def("winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "winograd_conv3x3(Tensor x, Tensor packed_weight, Tensor? bias=None, Tensor? residual=None) "
      "-> Tensor");
}
