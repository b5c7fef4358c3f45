"""The real Cosmos3 stage of SGLang on a CPU: what it needs to be imported, built, run and hooked.

Importing this module makes `sglang.multimodal_gen` importable without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]

# The torchvision wheel's library, built for CUDA, cannot load here; diffusion uses none of its
# ops, but torchvision refuses to be imported without their schemas.
_torchvision_schemas = torch.library.Library("torchvision", "DEF")
_torchvision_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.multimodal_gen.configs.models.vaes.wanvae import (  # noqa: E402
    WanVAEArchConfig,
    WanVAEConfig,
)
from sglang.multimodal_gen.configs.sample.cosmos3 import Cosmos3SamplingParams  # noqa: E402
from sglang.multimodal_gen.configs.sample.sampling_params import DataType  # noqa: E402
from sglang.multimodal_gen.runtime.models.vaes.wanvae import AutoencoderKLWan  # noqa: E402
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req  # noqa: E402
from sglang.multimodal_gen.runtime.pipelines_core.stages.model_specific_stages.cosmos3 import (  # noqa: E402
    Cosmos3ImagePreprocessStage,
    Cosmos3LatentPreparationStage,
)
from sglang.multimodal_gen.runtime.post_training import weights_updater  # noqa: E402
from sglang.multimodal_gen.runtime.server_args import set_global_server_args  # noqa: E402

from cosmos3_fast.engines import selftest  # noqa: E402
from cosmos3_fast.engines import sglang as engine  # noqa: E402
from cosmos3_fast.vae.live import seam  # noqa: E402
from cosmos3_fast.vae.synthetic import (  # noqa: E402
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
)

RELEASE = tuple(int(part) for part in importlib.metadata.version("sglang").split(".")[:3])
PADS_CLIPS = RELEASE >= (0, 5, 23)
"""Whether the stage itself repeats the last frame of a clip that is too short."""
CLEARS_PIXELS = RELEASE >= (0, 5, 23)
"""Whether the stage drops the request's pixels, which the next one reads in older releases."""
HAS_PLUGINS = importlib.util.find_spec(engine._PLUGINS) is not None
"""Whether hooks are registered with SGLang; where not, an external model package wraps methods."""
if HAS_PLUGINS:
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry

SERVER_ARGS = SimpleNamespace(comfyui_mode=False, enable_layerwise_nvtx_marker=False)
set_global_server_args(SERVER_ARGS)

__all__ = [
    "AutoencoderKLWan",
    "Cosmos3ImagePreprocessStage",
    "Cosmos3LatentPreparationStage",
    "DataType",
    "make_batch",
    "make_stage",
    "make_vae",
    "outputs",
    "patched",
    "pixel_frames_encoded",
    "run",
]


def make_vae(
    dtype: torch.dtype = torch.bfloat16,
    base_dim: int = 16,
    seed: int = 0,
    arch: dict[str, Any] | None = None,
    decoder_base_dim: int | None = None,
    **settings: Any,
) -> AutoencoderKLWan:
    """SGLang's VAE in Cosmos3's topology with seeded random weights.

    Args:
        base_dim: width of the encoder; Cosmos3 has 160.
        arch: what of the topology is not Cosmos3's.
        decoder_base_dim: width of the decoder, Cosmos3's 256; None: a narrow one, all zeros.
        settings: of `WanVAEConfig`, such as `use_feature_cache`.
    """
    config = synthetic_config({**COSMOS3_VAE_CONFIG, "base_dim": base_dim, **(arch or {})}, seed)
    names = set(WanVAEArchConfig.__dataclass_fields__)
    values = {name: value for name, value in config.items() if name in names}
    values["decoder_base_dim"] = decoder_base_dim or 8
    with torch.device("meta"):
        vae = AutoencoderKLWan(WanVAEConfig(arch_config=WanVAEArchConfig(**values), **settings))
    state = synthetic_state_dict(config, seed)
    if decoder_base_dim is not None:
        state |= synthetic_decoder_state_dict(
            {**config, "decoder_base_dim": decoder_base_dim}, seed
        )
    for name, tensor in vae.state_dict().items():
        if name not in state:
            state[name] = torch.zeros(tensor.shape)
    vae.load_state_dict(state, assign=True)
    return vae.to(dtype).eval().requires_grad_(False)


def make_stage(vae: nn.Module, **transformer: Any) -> Cosmos3LatentPreparationStage:
    """The stage; `transformer` overrides what it reads of the diffusion transformer."""
    attributes = {
        "latent_channel": 48,
        "sound_gen": True,
        "sound_dim": 4,
        "sound_latent_fps": 25.0,
        "action_dim": 8,
        **transformer,
    }
    return Cosmos3LatentPreparationStage(vae, SimpleNamespace(**attributes))


def make_batch(
    image: Tensor | None = None,
    video: Tensor | None = None,
    extra: dict[str, Any] | None = None,
    generator: torch.Generator | None = None,
    is_warmup: bool = False,
    **sampling: Any,
) -> Req:
    """A request as the stages before this one leave it; 17 frames of 32x48 unless told."""
    sampling = {"height": 32, "width": 48, "num_frames": 17, "seed": 7, **sampling}
    batch = Req(sampling_params=Cosmos3SamplingParams(prompt="a street", **sampling))
    batch.preprocessed_image = None if image is None else image.clone()
    batch.preprocessed_video = None if video is None else video.clone()
    batch.extra.update(extra or {})
    batch.generator = generator
    batch.is_warmup = is_warmup
    return batch


def run(stage: Cosmos3LatentPreparationStage, batch: Req) -> Req:
    """As the engine's executor runs it: in inference mode, through `PipelineStage.__call__`."""
    with torch.inference_mode():
        result = stage(batch, SERVER_ARGS)
    assert result is batch
    return batch


def outputs(batch: Req) -> dict[str, Any]:
    """All that a batch holds, its sampling parameters and its generator's state included."""
    found = {**vars(batch), "sampling_params": vars(batch.sampling_params)}
    del found["metrics"]  # holds times
    if batch.generator is not None:
        found["generator"] = batch.generator.get_state()
    return found


PLUGINS = "sglang.multimodal_gen.plugins"


def write_metadata(site: Path, **others: str) -> None:
    """What installing this package leaves in `site`, made from pyproject.toml; `others` are further
    plugins for SGLang. Where the package is installed too, the metadata that Python finds first
    counts."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / "cosmos3_fast-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n"
    )
    plugins = {**project["entry-points"][PLUGINS], **others}
    entries = "\n".join(f"{name} = {target}" for name, target in plugins.items())
    (folder / "entry_points.txt").write_text(f"[{PLUGINS}]\n{entries}\n")


HOOKED = ("__init__", "forward", "component_uses", "use_declared_component")
UPDATES = "_load_weights_into_module"


@contextmanager
def patched(mode: str) -> Iterator[None]:
    """SGLang with this package's plugin registered and applied by SGLang's own registry, if any.

    VAEs that were accelerated inside are plain again behind it.
    """
    before = {name: vars(Cosmos3LatentPreparationStage).get(name) for name in HOOKED}
    accelerate, seen = seam.accelerate, []

    def remembering(vae: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(vae)
        return accelerate(vae, *args, **kwargs)

    seam.accelerate = remembering
    os.environ["COSMOS3_FAST"] = mode
    try:
        if HAS_PLUGINS:
            engine.register()
            HookRegistry.apply_hooks()
        else:
            engine.register_without_plugins()
        yield
    finally:
        seam.accelerate = accelerate
        for vae in seen:
            seam.restore(vae)
        del os.environ["COSMOS3_FAST"]
        unpatch(before)


def unpatch(before: dict[str, Any]) -> None:
    """The stage's class with the methods `before`, and nothing registered."""
    if HAS_PLUGINS:
        HookRegistry.reset()
    setattr(weights_updater, UPDATES, inspect.unwrap(getattr(weights_updater, UPDATES)))
    engine._registered = False
    for name, value in before.items():
        if value is not None:
            setattr(Cosmos3LatentPreparationStage, name, value)
        elif name in vars(Cosmos3LatentPreparationStage):
            delattr(Cosmos3LatentPreparationStage, name)


def pixel_frames_encoded(vae: AutoencoderKLWan) -> AbstractContextManager[list[int]]:
    """Frames of each chunk of pixels that reaches the encoder's first convolution."""
    return selftest.frames_through(vae.encoder.conv_in)
