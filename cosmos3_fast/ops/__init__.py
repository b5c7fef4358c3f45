"""The ops `torch.ops.cosmos3.*`, one module each; importing this package makes them exist.

A module holds everything Python about its op: typed wrapper, reference, argument check, fake
kernel, autograd and registration. `registry` decides which backend serves.
"""

from cosmos3_fast.ops.pack_pixels import pack_pixels
from cosmos3_fast.ops.prepare_latents import prepare_latents, prepare_latents_
from cosmos3_fast.ops.registry import BackendUnavailableError, default_backend
from cosmos3_fast.ops.resize_crop import resize_crop
from cosmos3_fast.ops.rms_norm_silu import add_pad, add_rms_norm_silu, rms_norm_silu
from cosmos3_fast.ops.transform_frames import transform_frames
from cosmos3_fast.ops.unpack_pixels import unpack_pixels
from cosmos3_fast.ops.winograd import takes_winograd, winograd_conv3x3, winograd_pack

__all__ = [
    "BackendUnavailableError",
    "add_pad",
    "add_rms_norm_silu",
    "default_backend",
    "pack_pixels",
    "prepare_latents",
    "prepare_latents_",
    "resize_crop",
    "rms_norm_silu",
    "takes_winograd",
    "transform_frames",
    "unpack_pixels",
    "winograd_conv3x3",
    "winograd_pack",
]
