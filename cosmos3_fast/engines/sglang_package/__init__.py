"""For SGLANG_EXTERNAL_MODEL_PACKAGE: what SGLang without plugins (before 0.5.21) imports of us.

SGLang's diffusion engine imports it in each process once its pipelines are known, and before it
builds one. `sglang.srt`, which serves language models, reads the same variable and looks for models
in the folder of the package: it finds none, and nothing is hooked there.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger(__name__)

_LOADER = "sglang.multimodal_gen.runtime.utils.external_model_package"

if _LOADER in sys.modules:
    try:
        from cosmos3_fast.engines.sglang import register_without_plugins

        register_without_plugins()
    except Exception as error:  # the engine serves without us
        logger.warning("cosmos3_fast leaves SGLang as it is: %s", error)
