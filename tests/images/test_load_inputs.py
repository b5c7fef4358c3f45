"""What users hand in as a picture: wide modes, alpha, streams, URLs, extreme shapes, clip files."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from cosmos3_fast.images import resize as pixels
from cosmos3_fast.images.load import load_frames, load_pixels


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gray(values: np.ndarray) -> torch.Tensor:
    """uint8 [H,W] as `load_frames` gives a gray picture of its size."""
    return torch.from_numpy(values)[None, :, :, None].expand(-1, -1, -1, 3)


GRAY = noise(32, 48)
WIDE = GRAY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(WIDE),
        Image.frombytes("I;16B", (48, 32), WIDE.astype(">u2").tobytes()),
        Image.frombytes("I;16L", (48, 32), WIDE.astype("<u2").tobytes()),
        Image.fromarray(WIDE.astype(np.int32)),
        Image.fromarray(WIDE.astype(np.float32)),
    ],
    ids=lambda image: image.mode,
)
def test_16_bits_are_scaled(image):
    with pytest.warns(UserWarning, match="divided by 257"):
        assert torch.equal(load_frames(image, 32, 48), gray(GRAY))
    for kind in ("PNG", "TIFF"):
        if image.mode in ("I;16", "I;16B"):
            with pytest.warns(UserWarning, match="divided by 257"):
                assert torch.equal(load_frames(encoded(image, kind), 32, 48), gray(GRAY))


def test_a_big_endian_tiff_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.frombytes("I;16B", (48, 32), WIDE.astype(">u2").tobytes())
    data = encoded(turned, "TIFF", exif=exif)
    with pytest.warns(UserWarning, match="divided by 257"):
        upright = load_frames(data, 48, 32)
    assert torch.equal(upright, gray(np.rot90(GRAY, -1).copy()))


@pytest.mark.filterwarnings("error")
def test_wide_modes_that_hold_8_bits():
    assert torch.equal(load_frames(Image.fromarray(GRAY.astype(np.int32)), 32, 48), gray(GRAY))
    assert torch.equal(load_frames(Image.fromarray(GRAY.astype(np.float32)), 32, 48), gray(GRAY))
    with pytest.raises(UserWarning, match="taken as 8-bit"):  # a warning, an error in this test
        load_frames(Image.fromarray(GRAY.astype(np.uint16)), 32, 48)


def test_float_pictures_in_0_1_are_scaled():
    unit = Image.fromarray(GRAY.astype(np.float32) / 255)
    for given in (unit, encoded(unit, "TIFF")):
        with pytest.warns(UserWarning, match="multiplied by 255"):
            assert torch.equal(load_frames(given, 32, 48), gray(GRAY))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 70000.0])
def test_wide_values_that_make_no_picture(bad):
    values = np.zeros((4, 5), np.float32)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"must hold (finite values|values in \[0, 255\])"):
        load_frames(Image.fromarray(values), 32, 48)


def covering(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """What Pillow makes: resized to cover the size, cropped at the centre."""
    scale = max(width / image.width, height / image.height)
    w, h = math.ceil(scale * image.width), math.ceil(scale * image.height)
    left, top = (w - width) // 2, (h - height) // 2
    resized = image.resize((w, h), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized.crop((left, top, left + width, top + height))))[None]


@pytest.mark.parametrize(("width", "height"), [(300_000, 10), (3, 100_000)])
def test_extreme_aspect_ratios_cost_what_their_crop_costs(width, height):
    """All of the resized image would take tens of gigabytes."""
    image = Image.effect_noise((width, height), 100).convert("RGB")
    cropped = load_frames(image, 480, 832)
    assert cropped.shape == (1, 480, 832, 3)
    assert torch.equal(load_frames(np.array(image), 480, 832), cropped)


@pytest.mark.parametrize(("width", "height"), [(3000, 10), (10, 3000), (900, 20)])
def test_extreme_aspect_ratios_are_pillow_s_to_the_bit(width, height):
    image = Image.fromarray(noise(height, width, 3))
    assert torch.equal(load_frames(image, 40, 64), covering(image, 40, 64))


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize(("width", "height"), [(100, 90), (61, 200), (200, 61), (130, 401)])
def test_bands_of_a_picture_give_all_of_it(width, height, exported, monkeypatch):
    image = Image.fromarray(noise(height, width, 3))
    of_band = pixels.pixels_of
    # As for a picture too large to lie in one piece, of which each band does.
    monkeypatch.setattr(
        pixels, "pixels_of", lambda x: of_band(x) if exported and x.size != image.size else None
    )
    for size in ((48, 80), (80, 48), (120, 130)):
        for rows in (1, 3, 64, 9):
            monkeypatch.setattr(pixels, "_BAND", 4 * width * (rows - 1))
            assert torch.equal(load_frames(image, *size), covering(image, *size))


def test_a_picture_that_no_size_covers():
    with pytest.raises(ValueError, match="image must be less elongated to cover 2000x2000, got 1x"):
        load_frames(torch.zeros(1 << 21, 1, 3, dtype=torch.uint8), 2000, 2000)


def test_a_picture_is_left_as_it_was(tmp_path):
    image = Image.fromarray(noise(40, 50, 3))
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        first = load_frames(opened, 32, 48)
        first.zero_()
        array = np.array(image)
        for given in (opened, array, torch.from_numpy(array)):
            again = load_frames(given, 40, 50)
            assert torch.equal(again, torch.from_numpy(np.array(image))[None])
            again.zero_()
        assert np.array_equal(np.array(opened), np.array(image))
        assert np.array_equal(array, np.array(image))


def test_frames_for_a_device():
    array = noise(40, 50, 3)
    for given in (Image.fromarray(array), array, torch.from_numpy(array), [array, array]):
        frames = load_frames(given, 32, 48, device="cpu")
        assert torch.equal(frames, load_frames(given, 32, 48))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_alpha_shows_a_background_where_one_is_given(mode):
    rgba = noise(32, 48, 4)
    rgba[:, :16, 3], rgba[:, 16:, 3] = 0, 255
    image = Image.fromarray(rgba)
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = bytes([0] * 8 + [255] * 8)
    else:
        image = image.convert(mode)
    with pytest.warns(UserWarning, match="transparent pixels"):
        dropped = load_frames(image, 32, 48)
    assert torch.equal(dropped[0], torch.from_numpy(np.array(image.convert("RGB"))))
    opaque = torch.from_numpy(np.array(image.convert("RGBA")))[..., 3] == 255
    for color in ("red", "#ff0000", (255, 0, 0)):
        painted = load_frames(image, 32, 48, background=color)[0]
        assert torch.equal(painted[opaque], dropped[0][opaque])
        assert (painted[~opaque] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all()


@pytest.mark.filterwarnings("error")
def test_opaque_alpha_does_not_warn_and_arrays_have_alpha_too():
    rgba = noise(32, 48, 4)
    rgba[..., 3] = 255
    assert torch.equal(load_frames(rgba, 32, 48)[0], torch.from_numpy(rgba[..., :3].copy()))
    rgba[..., 3] = 0
    white = load_frames(rgba, 32, 48, background="white")
    assert (white == 255).all()
    assert (load_frames(rgba[None], 32, 48, background="white") == 255).all()


@pytest.mark.parametrize("color", ["no color", (1, 2), (0, 0, 300), 7, ("a", "b", "c")])
def test_a_background_that_is_none(color):
    with pytest.raises(ValueError, match="background must be a color such as 'white'"):
        load_frames(Image.new("RGB", (8, 8)), 32, 48, background=color)


def test_bytes_and_open_files(tmp_path):
    data = encoded(Image.fromarray(noise(40, 50, 3)), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    expected = load_frames(tmp_path / "a.png", 32, 48)
    read_on = io.BytesIO(data)
    read_on.read(7)
    with (tmp_path / "a.png").open("rb") as file:
        for given in (data, bytearray(data), memoryview(data), io.BytesIO(data), read_on, file):
            assert torch.equal(load_frames(given, 32, 48), expected)
            assert torch.equal(load_frames([given], 32, 48)[:, 0], expected)
    with (tmp_path / "a.png").open() as text, pytest.raises(ValueError, match="opened as text"):
        load_frames(text, 32, 48)
    with pytest.raises(ValueError, match=r"image \(3 bytes\) cannot be read as an image"):
        load_frames(b"abc", 32, 48)


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "HTTP://example.com", "file:///tmp/a.png", "s3://bucket/a.png",
     "data:image/png;base64," + "A" * 5000],
)  # fmt: skip
def test_urls_get_an_answer(url):
    with pytest.raises(ValueError, match="is a URL: download or decode it first") as caught:
        load_frames(url, 32, 48)
    assert len(str(caught.value)) < 200
    assert url[:20] in str(caught.value)
    with pytest.raises(ValueError, match=r"clip frame 1 .* is a URL"):
        load_frames([Image.new("RGB", (8, 8)), url], 32, 48)


def test_long_names_are_cut():
    for path in ("a" * 5000, "a/" * 3000):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_frames(path, 32, 48)
        assert len(str(caught.value)) < 200


def test_heic_names_its_plugin(tmp_path):
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(ValueError, match=r"cannot be read as an image.*pip install pillow-heif"):
        load_frames(path, 32, 48)


def test_integers_of_numpy_and_torch():
    image = Image.fromarray(noise(40, 50, 3))
    expected = load_frames(image, 32, 48)
    for kind in (np.int64, np.int32, np.uint16, np.array, torch.tensor):
        assert torch.equal(load_frames(image, kind(32), kind(48)), expected)
        assert load_frames([image] * 3, 32, 48, max_frames=kind(2)).shape[1] == 2
    for wrong in (np.float32(32), np.array([32]), np.bool_(True)):
        with pytest.raises(ValueError, match="height must be a positive integer"):
            load_frames(image, wrong, 48)
    with pytest.raises(ValueError, match=r"height must be below 2\^31"):
        load_frames(image, 10**5000, 48)


class TestFloats:
    def test_unit_range_warns(self):
        with pytest.warns(UserWarning, match=r"\[-1,1\] is expected"):
            load_pixels(torch.rand(3, 32, 48), 32, 48)

    @pytest.mark.filterwarnings("error")
    def test_signed_range_does_not(self):
        load_pixels(torch.rand(3, 32, 48) - 0.5, 32, 48)

    def test_overshoot_is_clipped_and_the_tensor_left_alone(self):
        given = torch.linspace(-1.0009, 1.0009, 3 * 32 * 48).view(3, 32, 48)
        before = given.clone()
        assert torch.equal(load_pixels(given, 32, 48)[0], before.clamp(-1, 1))
        assert torch.equal(given, before)
        with pytest.raises(ValueError, match=r"must be in \[-1,1\]"):
            load_pixels(given * 1.01, 32, 48)


FRAMES = [Image.fromarray(noise(32, 48, 3, seed=i)) for i in range(5)]


@pytest.fixture(params=["GIF", "WEBP", "PNG", "TIFF"])
def animation(request, tmp_path):
    path = tmp_path / f"clip.{request.param.lower()}"
    lossless = {"lossless": True} if request.param == "WEBP" else {}
    FRAMES[0].save(path, request.param, save_all=True, append_images=FRAMES[1:], **lossless)
    with Image.open(path) as opened:
        frames = [np.array(page.convert("RGB")) for page in ImageSequence.Iterator(opened)]
    assert len(frames) == 5
    return path, torch.from_numpy(np.stack(frames))[None]


@pytest.mark.filterwarnings("error")
def test_files_with_several_frames_are_clips(animation):
    path, frames = animation
    with Image.open(path) as opened:
        opened.seek(2)
        for given in (path, path.read_bytes(), opened):
            assert torch.equal(load_frames(given, 32, 48), frames)
            assert torch.equal(load_frames(given, 32, 48, max_frames=2), frames[:, :2])
            assert torch.equal(load_frames(given, 32, 48, max_frames=9), frames)
            last = load_frames(given, 32, 48, max_frames=2, keep="last")
            assert torch.equal(last, frames[:, 3:])
        assert opened.tell() == 2
        with pytest.raises(ValueError, match=r"clip frame 1 .* is an animation"):
            load_frames([FRAMES[0], opened], 32, 48)
    with pytest.raises(ValueError, match=r"clip frame 0 .* is an animation"):
        load_frames([path], 32, 48)


def test_keep_last_of_arrays_and_lists():
    frames = noise(4, 32, 48, 3)
    expected = torch.from_numpy(frames[2:])[None]
    for given in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        assert torch.equal(load_frames(given, 32, 48, max_frames=2, keep="last"), expected)
    floats = torch.rand(1, 3, 4, 32, 48) - 0.5
    last = load_frames(floats, 32, 48, max_frames=3, keep="last")
    assert torch.equal(last, floats[:, :, 1:])
    with pytest.raises(ValueError, match="keep must be 'first' or 'last', got 'middle'"):
        load_frames(frames, 32, 48, keep="middle")


def test_a_tiff_with_a_thumbnail_is_a_picture(tmp_path):
    path = tmp_path / "photo.tiff"
    FRAMES[0].save(path, save_all=True, append_images=[FRAMES[1].resize((12, 8))])
    with pytest.warns(UserWarning, match="pages of different sizes"):
        assert load_frames(path, 32, 48).shape == (1, 32, 48, 3)


def test_a_broken_frame_is_named(tmp_path):
    path = tmp_path / "clip.tiff"
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], compression="tiff_deflate")
    data = bytearray(path.read_bytes())
    with Image.open(path) as opened:
        opened.seek(3)
        (offset, *_), (size, *_) = opened.tag_v2[273], opened.tag_v2[279]
    data[offset : offset + size] = bytes(size)
    with pytest.raises(ValueError, match=r"frame 3 of image .* cannot be read"):
        load_frames(bytes(data), 32, 48)
    assert load_frames(bytes(data), 32, 48, max_frames=3).shape[1] == 3


@pytest.fixture
def video(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra [video])")
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)  # lossless
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for image in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def test_videos_are_clips(video):
    frames = torch.from_numpy(np.stack([np.array(image) for image in FRAMES]))[None]
    for given in (video, video.read_bytes()):
        assert torch.equal(load_frames(given, 32, 48), frames)
        assert torch.equal(load_frames(given, 32, 48, max_frames=2), frames[:, :2])
        assert torch.equal(load_frames(given, 32, 48, max_frames=2, keep="last"), frames[:, 3:])
    with pytest.raises(ValueError, match="cannot be read as a video"):
        load_frames(video.read_bytes()[:100], 32, 48)


def test_without_pyav_a_video_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for name, start in (("a.mp4", b""), ("b", b"\0\0\0\x18ftypisom"), ("c", b"\x1aE\xdf\xa3")):
        path = tmp_path / name
        path.write_bytes(start + bytes(40))
        with pytest.raises(ValueError, match=r"pip install 'cosmos3-fast\[video\]'"):
            load_frames(path, 32, 48)
