"""One stored picture or clip to pixels of the size that is encoded, and where they came from."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cosmos3_fast.bulk.buckets import Sizes, crop_box
from cosmos3_fast.bulk.sources import Item
from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.images.clips import read_file
from cosmos3_fast.images.decode import Color
from cosmos3_fast.images.resize import resize_frames

# Pillow names the stream that it was given.
_ADDRESS = re.compile(r" <\S+ object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class Sample:
    """What is known of a sample apart from its latents: its row of the manifest.

    Attributes:
        source: the name of the picture or clip.
        file_index, row: its place in the source, by which samples are ordered.
        content_hash: SHA-256 of the file's bytes, in hexadecimal.
        original_height, original_width: pixels of the upright picture.
        crop: (left, top, right, bottom), in those pixels, of what was encoded.
        pixel_height, pixel_width, pixel_frames: what was encoded.
        warnings: what reading it warned of; "" for nothing.
    """

    source: str
    file_index: int
    row: int
    content_hash: str
    original_height: int
    original_width: int
    crop: tuple[float, float, float, float]
    pixel_height: int
    pixel_width: int
    pixel_frames: int
    warnings: str

    @property
    def key(self) -> str:
        return key_of(self.content_hash)


@dataclass(frozen=True)
class Failure:
    """A picture that could not be encoded, and why; without a hash if it could not be read."""

    source: str
    file_index: int
    row: int
    content_hash: str | None
    reason: str


@dataclass(frozen=True)
class Known:
    """A picture whose content has latents already."""

    source: str
    content_hash: str


def key_of(content_hash: str) -> str:
    """The name of a sample: half of its content's hash, 128 bits."""
    return content_hash[:32]


@dataclass(frozen=True)
class Reader:
    """Reads items.

    Args:
        sizes: which size a picture gets.
        max_frames: of a clip, so many pixel frames are taken, or the most below it that are 1 + 4k.
        known: keys that need no latents.
        background: see `load.load_pixels`.
    """

    sizes: Sizes
    max_frames: int = 1
    known: Container[str] = frozenset()
    background: Color | None = None

    def read(self, item: Item) -> tuple[Sample, Tensor] | Failure | Known:
        """A sample and its pixels, uint8 [T, H, W, 3]; never raises for a broken picture."""
        if isinstance(item.data, Exception):
            return failure(item, None, item.data)
        content_hash = None
        try:
            content_hash = _hash(item.data)
            if key_of(content_hash) in self.known:
                return Known(item.source, content_hash)
            return self._decoded(item, content_hash)
        except Exception as error:
            return failure(item, content_hash, error)

    def _decoded(self, item: Item, content_hash: str) -> tuple[Sample, Tensor]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            images, _ = read_file(
                item.data, "picture", max_frames=self.max_frames, background=self.background
            )
        images = images[: pixel_frames(latent_frames(len(images)))]
        height, width = images[0].height, images[0].width
        target = self.sizes.choose(height, width)
        sample = Sample(
            item.source,
            item.index,
            item.row,
            content_hash,
            height,
            width,
            crop_box(height, width, *target),
            *target,
            len(images),
            "; ".join(dict.fromkeys(str(each.message) for each in warned)),
        )
        return sample, resize_frames(images, *target)


def failure(item: Item, content_hash: str | None, error: Exception) -> Failure:
    reason = _ADDRESS.sub("", " ".join(str(error).split())) or type(error).__name__
    return Failure(item.source, item.index, item.row, content_hash, reason)


def _hash(data: bytes | Path) -> str:
    digest = hashlib.sha256()
    if isinstance(data, Path):
        with data.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    else:
        digest.update(data)  # raises where it is no bytes: nothing else is content
    return digest.hexdigest()
