"""The memory in which Pillow keeps a picture, read where it is.

Pillow exports it by the Arrow C data interface (since 11.2; a part of Arrow's stable ABI):
https://arrow.apache.org/docs/format/CDataInterface.html
"""

from __future__ import annotations

import ctypes

import torch
from PIL.Image import Image
from torch import Tensor


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray`."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_capsule_pointer = ctypes.PyDLL(None).PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = ctypes.c_void_p


def pixels_of(image: Image) -> Tensor | None:
    """uint8 [H, W, 3], not to be written to, in the memory of an RGB picture.

    A pixel begins 4 bytes after the one before. The memory lives as long as the tensor.

    Returns:
        None where Pillow does not give it out: before 11.2, or where the picture lies in several
        pieces, as it does from 16 MB on.
    """
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError, MemoryError):
        return None
    pixels = _ArrowArray.from_address(_capsule_pointer(capsule, b"arrow_array"))
    count = image.width * image.height
    if (pixels.length, pixels.offset, pixels.n_children) != (count, 0, 1):
        return None
    values = pixels.children[0].contents
    if (values.length, values.offset, values.n_buffers) != (4 * count, 0, 2):
        return None
    memory = (ctypes.c_uint8 * (4 * count)).from_address(values.buffers[1])
    memory.owner = capsule  # type: ignore[attr-defined]
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.view(image.height, image.width, 4)[..., :3]
