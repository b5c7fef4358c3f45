"""vLLM-Omni's Cosmos3 pipeline, accelerated once this package is installed beside it.

vLLM-Omni loads `register` from the entry-point group `vllm_omni.general_plugins` in every
process. The environment variable COSMOS3_FAST chooses the mode:

- `exact` (default) and `off`: nothing is registered. vLLM-Omni 0.30 encodes only the pixel frames
  that the conditioned latent frames depend on and writes them in place; there is nothing that
  could be left out without changing a bit.
- `fast`: the pipeline of `cosmos3_fast.engines.vllm_omni_pipeline` takes the place of the
  engine's. Single frames go through the folded 2-D encoder; clips stay exact.
"""

from __future__ import annotations

import inspect
import logging
import re
from types import ModuleType

from cosmos3_fast.engines.common import mode_from_environment

logger = logging.getLogger(__name__)

ARCHITECTURES = ("Cosmos3OmniDiffusersPipeline", "Cosmos3OmniPipeline")
"""What `model_index.json` of a Cosmos3 checkpoint may name; one class serves both."""

KNOWN_VERSIONS = "0.30.x"

_OURS = "cosmos3_fast.engines.vllm_omni_pipeline"
_ENGINE = "vllm_omni.diffusion.models.cosmos3.pipeline_cosmos3"
_CLASS = "Cosmos3OmniDiffusersPipeline"
_PROCESSING = {
    "pre_process_func_name": "get_cosmos3_pre_process_func",
    "post_process_func_name": "get_cosmos3_post_process_func",
    "ir_op_priority_func_name": "get_cosmos3_ir_op_priority_func",
}
# What the subclass overrides or calls, and the parameters it relies on.
_METHODS = {
    "__init__": ["self", "od_config", "prefix"],
    "load_weights": ["self", "weights"],
    "_encode_conditioning_image_latent": ["self", "image_tensor"],
    "_encode_video_tensor": ["self", "video_tensor", "image_size"],
    "_to_vae_device": ["self", "tensor", "pin_cpu"],
    "_crop_latent_to_image_size": ["self", "latent", "image_size"],
}


def register() -> None:
    """Register the pipeline of the mode that COSMOS3_FAST asks for; vLLM-Omni calls this.

    Does nothing but log a warning where the installed vLLM-Omni is not one that the pipeline is
    known to fit, or where another plugin has replaced Cosmos3 already. Calling it again changes
    nothing.

    Raises:
        ValueError: COSMOS3_FAST holds something else than exact, fast or off.
    """
    mode = mode_from_environment()
    if mode != "fast":
        logger.info("cosmos3_fast: %s mode, vLLM-Omni's own Cosmos3 pipeline serves", mode)
        return
    try:
        difference = _difference_from_known()
    except Exception as error:  # a plugin must not keep other models from being served
        difference = f"its Cosmos3 pipeline cannot be inspected ({error!r})"
    if difference is not None:
        logger.warning(
            "cosmos3_fast leaves vLLM-Omni's Cosmos3 pipeline as it is: %s; known: vllm-omni %s",
            difference,
            KNOWN_VERSIONS,
        )
        return
    from vllm_omni.diffusion import registry

    if all(_registered_module(registry, name) == _OURS for name in ARCHITECTURES):
        return
    for name in ARCHITECTURES:
        registry.register_diffusion_model(name, _OURS, _CLASS, **_PROCESSING)
    logger.info("cosmos3_fast: fast mode, its Cosmos3 pipeline is registered")


def _difference_from_known() -> str | None:
    """What about the installed vLLM-Omni is not as the pipeline needs it; None if nothing is."""
    from vllm_omni.version import __version__

    if not re.match(r"0\.30\.\d", __version__):
        return f"found vllm-omni {__version__}"
    found = f"found vllm-omni {__version__}"

    from vllm_omni.diffusion import registry
    from vllm_omni.diffusion.models.cosmos3 import pipeline_cosmos3

    for name in ARCHITECTURES:
        module = _registered_module(registry, name)
        if module not in (_ENGINE, _OURS):
            return f"{found} with {name} served by {module}"
    pipeline = getattr(pipeline_cosmos3, _CLASS, None)
    if pipeline is None:
        return f"{found} without {_CLASS}"
    for name, wanted in _METHODS.items():
        method = getattr(pipeline, name, None)
        if method is None:
            return f"{found} without {_CLASS}.{name}"
        parameters = list(inspect.signature(method).parameters)
        if parameters != wanted:
            return f"{found} with {_CLASS}.{name}({', '.join(parameters)})"
    for name in _PROCESSING.values():
        if not callable(getattr(pipeline_cosmos3, name, None)):
            return f"{found} without {name}"
    return None


def _registered_module(registry: ModuleType, architecture: str) -> str | None:
    """The module that vLLM-Omni's registry would load `architecture` from."""
    model = registry.DiffusionModelRegistry.models.get(architecture)
    return getattr(model, "module_name", None)
