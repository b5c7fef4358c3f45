"""Images and clips against the formulas of SGLang's Cosmos3 stages, and every error."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cosmos3_fast.images.load import load_frames, load_pixels, normalize_frames

SIZES = [(480, 640), (64, 64), (100, 333), (333, 100), (37, 41), (1, 1)]


def sglang_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """load_image, Cosmos3ImagePreprocessStage.forward and preprocess_image of SGLang 0.5.23."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = max(width / image.width, height / image.height)
    w, h = math.ceil(scale * image.width), math.ceil(scale * image.height)
    image = image.resize((w, h), Image.Resampling.LANCZOS)
    top, left = (h - height) // 2, (w - width) // 2
    image = image.crop((left, top, left + width, top + height))
    array = np.stack([np.array(image).astype(np.float32) / 255.0], axis=0)
    return 2.0 * torch.from_numpy(array.transpose(0, 3, 1, 2)) - 1.0


def sglang_clip(frames: list[np.ndarray], height: int, width: int) -> torch.Tensor:
    """The video branch: _resize_crop_pil and _pil_to_normalized_tensor."""
    out = []
    for frame in frames:
        image = Image.fromarray(frame)
        scale = max(width / image.width, height / image.height)
        w, h = int(np.ceil(scale * image.width)), int(np.ceil(scale * image.height))
        image = image.resize((w, h), Image.Resampling.LANCZOS)
        left, top = (w - width) // 2, (h - height) // 2
        image = image.crop((left, top, left + width, top + height))
        out.append(torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0))
    return torch.stack([frame.permute(2, 0, 1) for frame in out], dim=1)[None]


def noise_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(48, 80), (80, 48), (64, 64)])
def test_image_equals_sglang(size, target):
    image = Image.fromarray(noise_array(*size, 3))
    pixels = load_pixels(image, *target)
    assert pixels.shape == (1, 3, *target)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert torch.equal(pixels, sglang_image(image, *target))


@pytest.mark.parametrize("size", SIZES)
def test_clip_equals_sglang(size):
    frames = noise_array(3, *size, 3)
    expected = sglang_clip(list(frames), 48, 80)
    for clip in (
        frames,
        torch.from_numpy(frames),
        list(frames),
        tuple(map(Image.fromarray, frames)),
    ):
        pixels = load_pixels(clip, 48, 80)
        assert pixels.shape == (1, 3, 3, 48, 80)
        assert pixels.is_contiguous()
        assert torch.equal(pixels, expected)


def test_every_byte_value():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    image, clip = load_pixels(ramp, 16, 16), load_pixels(ramp[None], 16, 16)[:, :, 0]
    assert torch.equal(image, sglang_image(Image.fromarray(ramp), 16, 16))
    assert torch.equal(clip, sglang_clip([ramp], 16, 16)[:, :, 0])
    assert image.unique().numel() == 256


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_modes(mode):
    image = Image.fromarray(noise_array(40, 50, 3)).convert(mode)
    assert torch.equal(load_pixels(image, 32, 32), sglang_image(image, 32, 32))


def test_palette_file_with_transparency(tmp_path):
    image = Image.fromarray(noise_array(40, 50)).convert("P")
    image.save(tmp_path / "p.png", transparency=3)
    path = tmp_path / "p.png"
    assert torch.equal(load_pixels(path, 32, 32), sglang_image(Image.open(path), 32, 32))


def test_alpha_is_dropped_not_composited():
    rgba = noise_array(32, 32, 4)
    assert torch.equal(load_pixels(rgba, 32, 32), load_pixels(rgba[..., :3].copy(), 32, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(noise_array(40, 72, 3)).save(path, exif=exif)
    expected = sglang_image(Image.open(path), 32, 48)
    assert torch.equal(load_pixels(path, 32, 48), expected)
    assert torch.equal(load_pixels(str(path), 32, 48), expected)
    assert torch.equal(load_pixels(Image.open(path), 32, 48), expected)


def test_uint8_arrays_in_any_memory_layout():
    array = noise_array(40, 50, 3)
    expected = load_pixels(array.copy(), 32, 32)
    flipped = array[::-1][::-1]
    planar = np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0)
    frozen = array.copy()
    frozen.flags.writeable = False
    for same in (flipped, planar, frozen, torch.from_numpy(array)):
        assert torch.equal(load_pixels(same, 32, 32), expected)
    gray = noise_array(40, 50)
    assert torch.equal(load_pixels(gray, 32, 32), load_pixels(gray[..., None], 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 3, 32, 48), (2, 3, 5, 32, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float_tensors_are_only_cast(shape, dtype):
    given = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    pixels = load_pixels(given, 32, 48)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (shape if len(shape) > 3 else (1, *shape))
    assert torch.equal(pixels.view(shape), given.float())
    if dtype != torch.bfloat16:
        assert torch.equal(load_pixels(given.numpy(), 32, 48), pixels)


def test_max_frames_reads_no_further(tmp_path):
    frames = noise_array(4, 32, 32, 3)
    expected = load_pixels(frames[:2], 32, 32)
    assert torch.equal(load_pixels(frames, 32, 32, max_frames=2), expected)
    missing = [*frames[:2], tmp_path / "missing.png", 7]
    assert torch.equal(load_pixels(missing, 32, 32, max_frames=2), expected)
    floats = torch.zeros(1, 3, 4, 32, 32)
    floats[:, :, 2:] = math.nan
    assert load_pixels(floats, 32, 32, max_frames=2).shape == (1, 3, 2, 32, 32)
    assert load_pixels(frames[:1], 32, 32, max_frames=5).shape[2] == 1


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image .*nowhere\.png' does not exist"):
        load_pixels(tmp_path / "nowhere.png", 32, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_file(kind, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise_array(64, 64, 3)).save(buffer, kind)
    data = buffer.getvalue()
    for kept in (len(data) // 2, 20, 1, 0):
        path = tmp_path / f"cut_{kept}.bin"
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"image .*cut_.* cannot be read as an image"):
            load_pixels(path, 32, 32)
        if kept == len(data) // 2:
            with pytest.raises(ValueError, match=r"clip frame 1 .* cannot be read as an image"):
                load_pixels([Image.new("RGB", (8, 8)), path], 32, 32)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "image must be a path, a PIL image.*got NoneType"),
        (3, TypeError, "got int"),
        ([3], TypeError, "clip frame 0 must be a path"),
        ([], ValueError, "clip is empty"),
        ("https://example.org/a.jpg", ValueError, "is a URL"),
        (
            np.zeros((8, 8, 3), np.int32),
            ValueError,
            "uint8 or floating point, got an array of int32",
        ),
        (np.zeros((8, 8, 3), np.uint16), ValueError, "got an array of uint16"),
        (np.zeros((8, 8, 3), object), ValueError, "got an array of object"),
        (torch.zeros(8, 8, 3, dtype=torch.int64), ValueError, r"got torch\.int64"),
        (torch.zeros(8, 8, 3, dtype=torch.bool), ValueError, r"got torch\.bool"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"got \[3, 8, 8\]"),
        (np.zeros((8,), np.uint8), ValueError, r"got \[8\]"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), ValueError, r"got \[1, 1, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, r"clip frame 0 .*got \[8, 8, 2\]"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "image is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "clip is empty"),
        (torch.zeros(32, 32, 3), ValueError, r"must have shape \[3,H,W\].*got \[32, 32, 3\]"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"got \[1, 4, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32), ValueError, "image is empty"),
        (torch.zeros(3, 32, 48), ValueError, "must be 32x32, got 32x48"),
        ([torch.zeros(3, 32, 32)], ValueError, r"clip frame 0 .*one \[B,3,T,H,W\] tensor"),
        (torch.full((3, 32, 32), 255.0), ValueError, r"in \[-1,1\].*must be given as uint8"),
        (torch.full((3, 32, 32), -1.5), ValueError, r"got values in \[-1.5, -1.5\]$"),
        (torch.full((3, 32, 32), math.nan), ValueError, "NaN or infinite"),
        (torch.full((3, 32, 32), math.inf), ValueError, "NaN or infinite"),
        (Image.new("RGB", (0, 4)), ValueError, "is empty"),
    ],
)
def test_wrong_input(value, error, message):
    size = (32, 32) if not isinstance(value, Image.Image) else (480, 832)
    with pytest.raises(error, match=message):
        load_pixels(value, *size)


def test_one_bad_value_is_found():
    for bad in (math.nan, -math.inf, 1.01):
        pixels = torch.zeros(1, 3, 32, 32)
        pixels[0, 2, 31, 31] = bad
        with pytest.raises(ValueError, match=r"NaN or infinite|in \[-1,1\]"):
            load_pixels(pixels, 32, 32)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        load_pixels(tmp_path, 32, 32)


@pytest.mark.parametrize("size", [(0, 32), (32, -1), (32.0, 32), (True, 32), ("32", 32)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=r"(height|width) must be a positive integer"):
        load_pixels(Image.new("RGB", (8, 8)), *size)
    with pytest.raises(ValueError, match="max_frames must be a positive integer, got 0"):
        load_pixels([Image.new("RGB", (8, 8))], 32, 32, max_frames=0)


def test_frames_are_the_pixels_before_normalisation():
    clip = np.random.default_rng(3).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    for given, shape in ((clip, (1, 3, 32, 48, 3)), (clip[0], (1, 32, 48, 3))):
        frames = load_frames(given, 32, 48)
        assert (frames.dtype, frames.shape) == (torch.uint8, shape)
        assert frames.is_contiguous()
        pixels = normalize_frames(frames)
        assert torch.equal(pixels, load_pixels(given, 32, 48))
        assert torch.equal(pixels.movedim(1, -1), frames.float().div(127.5) - 1)
    same = load_frames(clip[0], 40, 50)
    assert torch.equal(same[0], torch.from_numpy(clip[0]))
    floats = torch.rand(1, 3, 5, 32, 32)
    assert torch.equal(load_frames(floats, 32, 32, max_frames=2), floats[:, :, :2])
