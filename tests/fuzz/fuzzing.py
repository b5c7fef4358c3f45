"""Random op calls against numpy, and damaged files against the loaders: `make fuzz`.

Each case comes from a seed alone; a failure names it, and `--kind … --first SEED --count 1` repeats
it. As a script: runs so many of each kind, or as many as the time allows.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_fast import FrameEncoder, ops
from cosmos3_fast.images.load import load_frames
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config, synthetic_state_dict

Array = np.ndarray[Any, Any]
GUARD = 64
"""Elements on each side of a tensor that no op may touch."""
DTYPES = (torch.float32, torch.float64, torch.float16)


class Guarded(NamedTuple):
    """A tensor inside a larger buffer, whose other elements are known.

    Attributes:
        tensor: a view with strides of its own.
        buffer: all of it.
        before: a copy of `buffer` as it was.
    """

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    def check(self, may_change: bool = False) -> None:
        """Raises AssertionError where an element beside the tensor, or in it, has changed."""
        now = self.buffer.clone()
        if may_change:
            for each in (now, self.before):
                view = each.as_strided(
                    self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
                )
                view.zero_()
        # As bytes, because no NaN equals itself.
        same = torch.equal(now.view(torch.uint8), self.before.view(torch.uint8))
        assert same, "memory outside the result was written"


def guarded(values: Array, rng: np.random.Generator) -> Guarded:
    """`values` at random strides: dims in a random order, steps of one or two elements."""
    order = rng.permutation(values.ndim)
    steps = [int(rng.integers(1, 3)) for _ in order]
    strides, length = [0] * values.ndim, 1
    for dim, step in zip(order, steps, strict=True):
        strides[dim] = length * step
        length *= max(values.shape[dim], 1) * step
    source = torch.from_numpy(values)
    buffer = torch.full((length + 2 * GUARD,), 77, dtype=source.dtype)
    tensor = buffer.as_strided(values.shape, strides, GUARD)
    tensor.copy_(source)
    return Guarded(tensor, buffer, buffer.clone())


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    values = rng.standard_normal(shape).astype(str(dtype).removeprefix("torch."))
    if rng.random() < 0.2 and values.size:
        values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf, -0.0])
    return values


def _sizes(rng: np.random.Generator, count: int, most: int = 9) -> list[int]:
    return [int(each) for each in rng.integers(1, most, count)]


def fuzz_prepare_latents(rng: np.random.Generator) -> None:
    """Both forms that select, to the bit: new latents, and noise that is written in place."""
    batch, channels, frames, height, width = _sizes(rng, 5)
    dtype = DTYPES[rng.integers(len(DTYPES))]
    taken = sorted({int(t) for t in rng.integers(0, frames, rng.integers(1, 4))})
    kept = int(rng.choice([1, max(taken) + 1]))
    noise = _normal(rng, (batch, channels, frames, height, width), dtype)
    cond = _normal(rng, (int(rng.choice([1, batch])), channels, kept, height, width), dtype)
    wanted = noise.copy()
    for t in taken:
        wanted[:, :, t] = cond[:, :, t if kept > 1 else 0]
    mask = np.array([t not in taken for t in range(frames)], dtype=noise.dtype)
    given, conditions = guarded(noise, rng), guarded(cond, rng)
    latents, velocity_mask = ops.prepare_latents(conditions.tensor, given.tensor, taken)
    given.check()
    in_place = ops.prepare_latents_(conditions.tensor, given.tensor, taken)
    conditions.check()
    for each in (latents, given.tensor):
        np.testing.assert_array_equal(each.numpy(), wanted)
    for each in (velocity_mask, in_place):
        np.testing.assert_array_equal(each.numpy().reshape(-1), mask)
    given.check(may_change=True)


def fuzz_rms_norm_silu(rng: np.random.Generator) -> None:
    batch, channels, height, width = _sizes(rng, 4)
    channels = int(rng.choice([channels, 16 * channels, 37]))
    dtype = DTYPES[rng.integers(len(DTYPES))]
    shape = (batch, channels, height, width)
    x, residual = rng.standard_normal((2, *shape)).astype(str(dtype).removeprefix("torch."))
    weight, bias = rng.standard_normal((2, channels)).astype(x.dtype)
    silu = bool(rng.random() < 0.5)
    y = x.astype(np.float64) + bias.astype(np.float64)[:, None, None] + residual.astype(np.float64)
    wanted = y / np.maximum(np.sqrt((y**2).sum(1, keepdims=True)), 1e-12)
    wanted = wanted * (channels**0.5 * weight.astype(np.float64)[:, None, None])
    if silu:
        wanted = wanted / (1 + np.exp(-wanted))
    arguments = [guarded(each, rng) for each in (x, weight, bias, residual)]
    x_, weight_, bias_, residual_ = (each.tensor for each in arguments)
    got = ops.rms_norm_silu(x_, weight_, silu, bias_, residual_).numpy().astype(np.float64)
    for each in arguments:
        each.check()
    # A sum over the channels in float32, a root, an exponential; and one rounding to the result.
    eps = torch.finfo(dtype).eps
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = eps * np.abs(wanted) + (8 + channels) * compute * (1 + np.abs(wanted).max())
    assert (np.abs(got - wanted) <= bound + torch.finfo(dtype).smallest_normal).all()


def fuzz_pixels(rng: np.random.Generator) -> None:
    """Bytes to patches and back, to the bit."""
    batch, rows, columns = _sizes(rng, 3)
    p = int(rng.integers(1, 4))
    pixels = rng.integers(0, 256, (batch, rows * p, columns * p, 3), dtype=np.uint8)
    given = guarded(pixels, rng)
    packed = ops.pack_pixels(given.tensor, p, torch.float32)
    given.check()
    floats = np.float32(2) * (pixels.astype(np.float32) / np.float32(255)) - np.float32(1)
    wanted = floats.reshape(batch, rows, p, columns, p, 3).transpose(0, 5, 2, 4, 1, 3)
    np.testing.assert_array_equal(packed.numpy(), wanted.reshape(batch, 3 * p * p, rows, columns))
    patches = guarded(packed.numpy(), rng)
    back = ops.unpack_pixels(patches.tensor, p, True)
    patches.check()
    np.testing.assert_array_equal(back.numpy(), pixels)


def fuzz_winograd(rng: np.random.Generator) -> None:
    in_channels, out_channels = 16 * int(rng.integers(1, 4)), 32 * int(rng.integers(1, 3))
    batch, height, width = _sizes(rng, 3)
    x = rng.standard_normal((batch, in_channels, height, width)).astype(np.float32)
    weight = rng.standard_normal((out_channels, in_channels, 3, 3)).astype(np.float32)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    wanted = np.zeros((batch, out_channels, height, width))
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + height, j : j + width]
            wanted += np.einsum("oc,bchw->bohw", weight[:, :, i, j].astype(np.float64), part)
    given = guarded(x, rng)
    got = ops.winograd_conv3x3(given.tensor, ops.winograd_pack(torch.from_numpy(weight))).numpy()
    given.check()
    # As the op's tests have it for more channels, of which no more are summed at a time.
    assert np.abs(got - wanted).max() <= 18 * np.finfo(np.float32).eps * np.abs(wanted).max()


def fuzz_resize_crop(rng: np.random.Generator) -> None:
    rows, columns, height, width = (int(each) for each in rng.integers(1, 40, 4))
    picture = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    top, left = int(rng.integers(height)), int(rng.integers(width))
    crop = (
        top,
        left,
        int(rng.integers(1, height - top + 1)),
        int(rng.integers(1, width - left + 1)),
    )
    filter = str(rng.choice(["lanczos", "bicubic", "bilinear"]))
    given = guarded(picture, rng)
    got = ops.resize_crop(given.tensor, (height, width), crop, filter)
    given.check()
    resampling = Image.Resampling[filter.upper()]
    resized = Image.fromarray(picture).resize((width, height), resampling)
    box = (left, top, left + crop[3], top + crop[2])
    np.testing.assert_array_equal(got.numpy(), np.array(resized.crop(box)))


OPS = (
    fuzz_prepare_latents,
    fuzz_rms_norm_silu,
    fuzz_pixels,
    fuzz_winograd,
    fuzz_resize_crop,
)


def fuzz_op(seed: int) -> None:
    """One call of the op whose turn it is."""
    OPS[seed % len(OPS)](np.random.default_rng(seed))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file cut short, with bytes changed, or with a piece left out or repeated."""
    content = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(content[: rng.integers(len(content))])
    if kind == 1:
        for _ in range(int(rng.integers(1, 12))):
            content[rng.integers(len(content))] = int(rng.integers(256))
        return bytes(content)
    begin, end = sorted(int(each) for each in rng.integers(0, len(content), 2))
    piece = content[begin:end]
    return bytes(content[:begin] + (piece * 2 if kind == 2 else b"") + content[end:])


def _check_message(error: Exception) -> None:
    assert "\n" not in str(error), "an error of several lines"


def fuzz_image(seed: int) -> None:
    """A damaged picture gives a picture of the size asked for, or an error of one line."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(each) for each in rng.integers(1, 60, 2))
    picture = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
    stored = io.BytesIO()
    picture.save(stored, str(rng.choice(["png", "jpeg", "gif", "webp", "tiff", "bmp"])))
    data = damaged(stored.getvalue(), rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            frames = load_frames(data, 32, 48, max_frames=4)
        except ValueError as error:
            _check_message(error)
            return
    assert frames.dtype == torch.uint8
    assert frames.shape[-3:] == (32, 48, 3)


def fuzz_checkpoint(seed: int, folder: Path) -> None:
    """A damaged checkpoint gives an encoder with finite weights, or an error of one line."""
    rng = np.random.default_rng(seed)
    small = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 1, 1, 1]}
    config = synthetic_config({**COSMOS3_VAE_CONFIG, **small})
    save_file(synthetic_state_dict(config), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    path = folder / names[rng.integers(2)]
    path.write_bytes(damaged(path.read_bytes(), rng))
    try:
        encoder = FrameEncoder.from_pretrained(folder)
    except (ValueError, OSError) as error:
        _check_message(error)
        return
    assert all(torch.isfinite(each).all() for each in encoder.state_dict().values())


def run(kind: str, first: int, count: int, deadline: float) -> int:
    """Cases `first` … of one kind, until `count` or the deadline.

    Returns:
        How many there were.

    Raises:
        AssertionError: a case that is wrong, by its seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[int], None]] = {
            "ops": fuzz_op,
            "images": fuzz_image,
            "checkpoints": lambda seed: fuzz_checkpoint(seed, Path(folder)),
        }
        for done in range(count):
            if time.monotonic() > deadline:
                return done
            try:
                cases[kind](first + done)
            except Exception as error:
                repeat = f"--kind {kind} --first {first + done} --count 1"
                raise AssertionError(f"{repeat}: {type(error).__name__}: {error}") from error
            if done % 10_000 == 9_999:
                print(f"{kind}: {done + 1} of {count}", flush=True)
    return count


COUNTS = {"ops": 100_000, "images": 600, "checkpoints": 100}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(COUNTS), help="default: all, one after the other")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, help=f"cases of each kind; default: {COUNTS}")
    parser.add_argument("--minutes", type=float, default=15, help="in all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.minutes
    for kind in [args.kind] if args.kind else reversed(COUNTS):
        wanted = args.count or COUNTS[kind]
        done = run(kind, args.first, wanted, deadline)
        print(f"{kind}: {done} of {wanted} cases, no fault", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
