"""Pipelines that put single frames through a VAE of these families, accelerated in one line.

Tiny real pipelines without text encoders: the prompt's embeddings are given. Images must agree
within a level of 255, the least that a picture shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_pipeline import make_inputs, make_pipe

from cosmos3_fast import accelerate, restore
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.topology import UnsupportedVAEError

LEVEL = 1 / 255
EMBEDS = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2))
MASK = torch.ones(1, 7, dtype=torch.long)
SIZE = {"height": 64, "width": 64}
TINY_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


def picture(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def qwen_image(
    kind: str, transformer: dict[str, Any] | None = None, channels: int = 3, **others: Any
) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, num_res_blocks=1, **({} if channels == 3 else {"input_channels": channels})
    ).eval()
    denoiser = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        **(transformer or {}),
    )  # fmt: skip
    return getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae, transformer=denoiser, **{"text_encoder": None, "tokenizer": None, **others},
    )  # fmt: skip


def qwen_image_layered(channels: int) -> Any:
    """`small_canvas` has to be there too. Of the text encoder, which is asked for its dtype, a
    stand-in."""
    return qwen_image(
        "QwenImageLayeredPipeline",
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
        channels,
        processor=None,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY_CLIP)),
    )


@pytest.fixture
def small_canvas(monkeypatch):
    """Qwen-Image-Layered's are 640 pixels wide at least."""
    layered = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_layered")
    monkeypatch.setattr(layered, "calculate_dimensions", lambda area, ratio: (64, 64))


def wan_22() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    ).eval()  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=48,
        out_channels=48, text_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(flow_shift=3.0), expand_timesteps=True,
    )  # fmt: skip


def wan_21(kind: str) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    others = {"expand_timesteps": False} if kind == "WanPipeline" else {}
    return getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(flow_shift=3.0), **others,
    )  # fmt: skip


def wan_21_i2v() -> Any:
    """Latents, a mask of four channels and the encoded clip of one picture and nothing; the picture
    also through CLIP."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36,
        out_channels=16, text_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
        image_dim=16, added_kv_proj_dim=24,
    )  # fmt: skip
    config = transformers.CLIPVisionConfig(**TINY_CLIP, image_size=32, patch_size=16)
    return diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(flow_shift=3.0),
        image_encoder=transformers.CLIPVisionModel(config).eval(),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )  # fmt: skip


def qwen_arguments() -> dict[str, Any]:
    return {"prompt_embeds": EMBEDS, "prompt_embeds_mask": MASK, "true_cfg_scale": 1.0, **SIZE}


def wan_arguments() -> dict[str, Any]:
    return {"prompt_embeds": EMBEDS, "guidance_scale": 1.0, "num_frames": 9, **SIZE}


def video_arguments() -> dict[str, Any]:
    arguments = wan_arguments()
    del arguments["num_frames"]
    return {**arguments, "video": [picture(i) for i in range(9)], "strength": 0.7}


# The pipeline, what it is called with, and the frames that its VAE encodes and decodes by itself:
# unpatched, and accelerated.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], Any, Any]] = {
    "Qwen-Image": (lambda: qwen_image("QwenImagePipeline"), qwen_arguments, (0, 1), (0, 0)),
    # Its latents are sampled from the posterior, with the log-variance.
    "Qwen-Image img2img": (
        lambda: qwen_image("QwenImageImg2ImgPipeline"),
        lambda: {**qwen_arguments(), "image": picture(), "strength": 0.6},
        (1, 1),
        (0, 0),
    ),
    "Qwen-Image edit plus": (
        lambda: qwen_image("QwenImageEditPlusPipeline", processor=None),
        lambda: {**qwen_arguments(), "image": [picture(0), picture(1)]},
        (2, 1),
        (0, 0),
    ),
    # One picture in, a clip out.
    "Wan 2.2 TI2V": (wan_22, lambda: {**wan_arguments(), "image": picture()}, (1, 3), (0, 0)),
    "Wan 2.1 image to video": (
        wan_21_i2v,
        lambda: {**wan_arguments(), "image": picture()},
        (9, 3),
        (0, 0),
    ),
    # Clips in and out.
    "Wan 2.1 video to video": (
        lambda: wan_21("WanVideoToVideoPipeline"),
        video_arguments,
        (9, 3),
        (0, 0),
    ),
    "Wan 2.1 text to video": (lambda: wan_21("WanPipeline"), wan_arguments, (0, 3), (0, 0)),
    "Cosmos3 text to image": (make_pipe, lambda: make_inputs("t2i", 64), (1, 1), (0, 0)),
    "Cosmos3 image to video": (make_pipe, lambda: make_inputs("i2v", 64), (17, 5), (0, 0)),
}


@contextmanager
def counted(vae: Any) -> Iterator[dict[str, int]]:
    """Frames that the VAE's own encoder and decoder are called with, by the class's forward.

    Not by a hook: an accelerated VAE with one runs its own code.
    """
    seen = {"encoder": 0, "decoder": 0}
    with pytest.MonkeyPatch.context() as patch:
        for part in seen:
            own = type(getattr(vae, part)).forward

            def forward(
                self: Any, x: torch.Tensor, *args: Any, part: str = part, own: Any = own, **kw: Any
            ) -> Any:
                seen[part] += x.shape[2]
                return own(self, x, *args, **kw)

            # A look at the VAE sees through it to the class's own.
            functools.update_wrapper(forward, own)
            setattr(forward, ATTRIBUTE, True)
            patch.setattr(type(getattr(vae, part)), "forward", forward)
        yield seen


def generate(pipe: Any, arguments: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    pipe.set_progress_bar_config(disable=True)
    if "prompt_embeds" not in arguments:
        arguments = {"prompt": "a rocket", "enable_safety_check": False, **arguments}
    with counted(pipe.vae) as seen:
        result = pipe(
            **arguments, num_inference_steps=3, output_type="np",
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    output = next(getattr(result, n) for n in ("images", "frames", "video") if hasattr(result, n))
    return np.asarray(output), (seen["encoder"], seen["decoder"])


def fold_clips(vae: Any) -> None:
    """Made at the first clip, which goes through the VAE's own code once, to be compared."""
    edge = 2 ** (len(vae.config.temperal_downsample) + 1)
    with torch.no_grad():
        vae.encode(torch.zeros(1, 3, 5, edge, edge, dtype=vae.dtype))
        vae.decode(torch.zeros(1, vae.config.z_dim, 2, 1, 1, dtype=vae.dtype))


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_the_same(name: str):
    make, arguments, own_frames, our_frames = CASES[name]
    pipe = make()
    plain, plain_frames = generate(pipe, arguments())
    assert accelerate(pipe) is pipe
    fold_clips(pipe.vae)
    ours, frames = generate(pipe, arguments())
    assert np.abs(ours - plain).max() <= LEVEL
    assert not np.array_equal(ours, plain)
    restore(pipe)
    again, again_frames = generate(pipe, arguments())
    assert np.array_equal(again, plain)
    assert (plain_frames, frames, again_frames) == (own_frames, our_frames, own_frames)


def layered_arguments() -> dict[str, Any]:
    arguments = {**qwen_arguments(), "prompt": "a rocket", "layers": 2}
    del arguments["height"], arguments["width"]
    return arguments


def test_layers_are_the_same(small_canvas: None) -> None:
    """Single frames as a batch. Of a VAE for RGB: the released one has transparency too."""
    pipe = qwen_image_layered(channels=3)
    arguments = {**layered_arguments(), "image": picture()}
    plain, plain_frames = generate(pipe, arguments)
    assert plain.shape[1:] == (2, 64, 64, 3)
    accelerate(pipe)
    ours, frames = generate(pipe, arguments)
    assert 0 < np.abs(ours - plain).max() <= LEVEL
    assert (plain_frames, frames) == ((1, 1), (0, 0))
    restore(pipe)
    assert np.array_equal(generate(pipe, arguments)[0], plain)


def test_a_vae_with_transparency_is_refused(small_canvas: None) -> None:
    pipe = qwen_image_layered(channels=4)
    arguments = {**layered_arguments(), "image": picture().convert("RGBA")}
    plain, _ = generate(pipe, arguments)
    assert plain.shape[1:] == (2, 64, 64, 4)
    with pytest.raises(UnsupportedVAEError, match=r"in_channels must be .* = 3, got 4"):
        accelerate(pipe)
    assert np.array_equal(generate(pipe, arguments)[0], plain)


def test_a_whole_bfloat16_run_of_cosmos3_by_frame() -> None:
    """One frame is encoded and all are decoded; none is further from a float32 VAE than diffusers'
    own, and no more between neighbours. Of three pictures together: of one, a frame of theirs may
    be near by chance."""
    pipe, precise = make_pipe(torch.bfloat16), make_pipe(torch.bfloat16)
    precise.vae.float()
    requests = [make_inputs("i2v", 64, seed) for seed in range(3)]
    wanted = [generate(precise, each)[0] for each in requests]

    def generated(expected: tuple[int, int]) -> list[np.ndarray]:
        videos, frames = zip(*(generate(pipe, each) for each in requests), strict=True)
        assert {*frames} == {expected}
        return list(videos)

    theirs = generated((17, 5))
    accelerate(pipe)
    fold_clips(pipe.vae)
    ours = generated((0, 0))
    for of in (np.stack, lambda videos: np.diff(videos, axis=1)):
        theirs_off, ours_off = (
            np.sqrt(np.square(of(each) - of(wanted)).mean((0, 2, 3, 4))) for each in (theirs, ours)
        )
        assert (ours_off <= theirs_off).all()


def tile(vae: Any) -> None:
    vae.enable_tiling(32, 32, 16, 16)


def slice_batch(vae: Any) -> None:
    vae.enable_slicing()


@pytest.mark.parametrize("change", [tile, slice_batch])
def test_settings_of_the_vae(change: Any) -> None:
    """Tiles that are smaller than the picture are the VAE's own, bit for bit."""
    pipe = wan_21("WanPipeline")
    change(pipe.vae)
    plain, _ = generate(pipe, wan_arguments())
    accelerate(pipe)
    ours, _ = generate(pipe, wan_arguments())
    assert np.array_equal(ours, plain) == (change is tile)
    assert np.abs(ours - plain).max() <= LEVEL


@pytest.mark.parametrize("products", [None, "float16"])
def test_a_float32_vae_beside_a_bfloat16_transformer(products: Any) -> None:
    """As diffusers advises for Wan."""
    pipe = wan_21("WanPipeline")
    pipe.transformer.to(torch.bfloat16)
    plain, _ = generate(pipe, wan_arguments())
    accelerate(pipe, products=products)
    ours, _ = generate(pipe, wan_arguments())
    assert not np.array_equal(ours, plain)
    # float16 products are allowed an eighth of what bfloat16 is.
    assert np.abs(ours - plain).max() <= LEVEL
