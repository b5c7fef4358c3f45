"""A real Cosmos3 pipeline of diffusers, a hundred thousand times smaller."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

try:
    from diffusers import Cosmos3OmniModularPipeline
except ImportError:  # diffusers 0.39
    Cosmos3OmniModularPipeline = None

from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae

VAE_CONFIG = {**COSMOS3_VAE_CONFIG, "base_dim": 16, "z_dim": 8}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRAMES = 17
# Actions run on a canvas of 256x256 at least, however small the image.
ACTION_FRAMES = 5


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes for words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def cast(transformer: Any, dtype: torch.dtype) -> Any:
    """In place, what `from_pretrained` keeps in float32 apart: diffusers 0.39 computes it there."""
    transformer.to(dtype)
    for name in transformer._keep_in_fp32_modules:
        getattr(transformer, name).float()
    return transformer


def make_components(
    dtype: torch.dtype = torch.float32, seed: int = 0, z_dim: int = VAE_CONFIG["z_dim"]
) -> dict[str, Any]:
    torch.manual_seed(seed)
    arguments = inspect.signature(Cosmos3OmniTransformer.__init__).parameters
    axes = [4, 2, 2]
    rope = (
        {"rope_axes_dim": axes}
        if "rope_axes_dim" in arguments
        else {"rope_scaling": {"mrope_section": axes}}  # diffusers 0.39
    )
    transformer = Cosmos3OmniTransformer(
        hidden_size=32,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        latent_channel=z_dim,
        latent_patch_size=2,
        patch_latent_dim=4 * z_dim,
        **rope,
        vocab_size=256 + len(SPECIAL_TOKENS),
        action_dim=12,
        action_gen=True,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return {
        "transformer": cast(transformer, dtype).eval(),
        "text_tokenizer": make_tokenizer(),
        "vae": synthetic_vae({**VAE_CONFIG, "z_dim": z_dim}, seed, decoder_base_dim=8).to(dtype),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def make_pipe(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    z_dim: int = VAE_CONFIG["z_dim"],
    **components: Any,
) -> Cosmos3OmniPipeline:
    components = {**make_components(dtype, seed, z_dim), **components}
    pipe = Cosmos3OmniPipeline(**components, enable_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_modular(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cls: Any = Cosmos3OmniModularPipeline,
    **components: Any,
) -> Any:
    if cls is None:
        import pytest

        pytest.skip("this release of diffusers has no modular Cosmos3")
    pipe = cls()
    pipe.update_components(**{**make_components(dtype, seed), **components})
    pipe.disable_safety_checker()
    return pipe


def make_clip(frames: int, size: int, seed: int = 0) -> torch.Tensor:
    """Pixels [frames, 3, size, size] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, size, size, generator=generator)


def make_image(size: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_inputs(case: str, size: int = 32, seed: int = 0) -> dict[str, Any]:
    """Arguments of the pipeline for one way to condition a video, by name as in `NEEDED`."""
    sizes: dict[str, Any] = {"height": size, "width": size}
    video: dict[str, Any] = {**sizes, "num_frames": FRAMES}
    if case == "t2v":
        return video
    if case == "t2i":
        return {**sizes, "num_frames": 1}
    if case == "i2v":
        return {**video, "image": make_image(size, seed)}
    if case == "v2v":
        return {**video, "video": make_clip(FRAMES, size, seed)}
    if case == "v2v_last":
        clip = make_clip(FRAMES + 4, size, seed)
        return {
            **video,
            "video": clip,
            "condition_video_keep": "last",
            "condition_frame_indexes_vision": [0, 2],
        }
    action: dict[str, Any] = {"mode": case, "chunk_size": ACTION_FRAMES - 1, "domain_name": "umi"}
    action["resolution_tier"] = 256
    if case == "inverse_dynamics":
        action["video"] = make_clip(ACTION_FRAMES, size, seed)
    else:
        action["image"] = make_image(size, seed)
    if case == "forward_dynamics":
        generator = torch.Generator().manual_seed(seed)
        action["raw_actions"] = torch.randn(ACTION_FRAMES - 1, 10, generator=generator)
    return {"action": CosmosActionCondition(**action)}


# Pixel frames that the VAE has to see in exact mode.
NEEDED = {
    "t2v": 0,
    "t2i": 0,
    "i2v": 1,
    "v2v": 5,
    "v2v_last": 9,
    "policy": 1,
    "forward_dynamics": 1,
    "inverse_dynamics": ACTION_FRAMES,
}


# Their pictures are 256 pixels high whatever the size of the video.
ACTIONS = ("policy", "forward_dynamics", "inverse_dynamics")


def total_frames(inputs: dict[str, Any]) -> int:
    """Pixel frames of the whole video."""
    return inputs["action"].chunk_size + 1 if "action" in inputs else inputs["num_frames"]


@contextmanager
def counting(vae: Any) -> Iterator[list[int]]:
    """Pixel frames that enter the first convolution of the VAE's encoder, call by call.

    Counted in the class, because a hook on the module would be a reason to use the VAE's own code;
    a module whose `forward` is replaced has such a reason already.
    """
    frames: list[int] = []
    encoder = getattr(vae, "_orig_mod", vae).encoder
    conv = getattr(encoder, "_orig_mod", encoder).conv_in
    if "forward" in vars(conv):
        handle = conv.register_forward_pre_hook(lambda _, args: frames.append(args[0].shape[2]))
        try:
            yield frames
        finally:
            handle.remove()
        return
    cls = type(conv)
    original = cls.forward

    def forward(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        if self is conv:
            frames.append(x.shape[2])
        return original(self, x, *args)

    # A look at the VAE sees through it to the class's own.
    functools.update_wrapper(forward, original)
    setattr(forward, ATTRIBUTE, True)
    cls.forward = forward
    try:
        yield frames
    finally:
        cls.forward = original


@dataclass(repr=False)
class Run:
    """One generation.

    Attributes:
        start: the latents that denoising started from.
        video: pixels [T, 3, H, W].
        action: of the modes that predict one.
        frames: pixel frames that reached the VAE's encoder.
    """

    start: torch.Tensor
    video: torch.Tensor
    action: torch.Tensor | None
    frames: int

    def same_as(self, other: Run) -> bool:
        """Bit for bit, the sign of zeros apart."""
        if (self.action is None) != (other.action is None):
            return False
        return (
            torch.equal(self.start, other.start)
            and torch.equal(self.video, other.video)
            and (self.action is None or torch.equal(self.action, other.action))
        )


def generate(pipe: Any, inputs: dict[str, Any], seed: int = 0) -> Run:
    starts = []
    original = type(pipe)._prepare_vision_segment

    def spy(*args: Any, input_vision_tokens: torch.Tensor, **kwargs: Any) -> Any:
        starts.append(input_vision_tokens.clone())
        return original(pipe, *args, input_vision_tokens=input_vision_tokens, **kwargs)

    generator = torch.Generator().manual_seed(seed)
    modular = Cosmos3OmniModularPipeline is not None and isinstance(
        pipe, Cosmos3OmniModularPipeline
    )
    arguments = {"prompt": "a cat", "generator": generator, "output_type": "pt", **inputs}
    if not (modular and pipe.default_blocks_name == "Cosmos3DistilledBlocks"):
        arguments["num_inference_steps"] = 2
    pipe._prepare_vision_segment = spy
    try:
        with counting(pipe.vae) as frames:
            if modular:
                result = pipe(output=["videos", "action"], **arguments)
                video, actions = result["videos"], result["action"]
            else:
                result = pipe(**arguments)
                video, actions = result.video, result.action
    finally:
        del pipe._prepare_vision_segment
    return Run(starts[0], video, actions[0] if actions else None, sum(frames))
