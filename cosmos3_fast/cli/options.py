"""What command-line options of several commands mean: sizes, dtypes, devices, a VAE's weights."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SYNTHETIC_SEED = 0


class UserError(Exception):
    """A fault of the command line or its inputs: one line, no traceback, exit status 2."""


def size_option(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"want HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(match[1]), int(match[2])


def dtype_option(text: str) -> str:
    name = _SHORT_DTYPES.get(text.strip().lower(), text.strip().lower())
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"want one of {', '.join(DTYPES)}, got {text!r}")
    return name


def device_option(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return device


class Progress:
    """One line on stderr per finished step, with the seconds it took."""

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        start = time.perf_counter()
        print(f"{text} ...", file=sys.stderr, end="", flush=True)
        try:
            yield
        except BaseException:
            print(file=sys.stderr)
            raise
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr)


@dataclass(frozen=True)
class VaeSource:
    """Where VAE weights come from: a checkpoint, or random weights of the Cosmos3 topology."""

    checkpoint: str | None

    def __str__(self) -> str:
        return self.checkpoint or f"synthetic (random weights, seed {SYNTHETIC_SEED})"

    def warn(self) -> None:
        if self.checkpoint is None:
            print(
                "NOTE: no --vae given. Using RANDOM weights of the Cosmos3 VAE's topology (seed "
                f"{SYNTHETIC_SEED}): the latents are MEANINGLESS to a Cosmos3 model.",
                file=sys.stderr,
            )

    def encoder(self, dtype: torch.dtype, device: torch.device, clips: bool) -> Any:
        from cosmos3_fast.vae import ClipEncoder, FrameEncoder

        kind: type[ClipEncoder | FrameEncoder] = ClipEncoder if clips else FrameEncoder
        if self.checkpoint is not None:
            return kind.from_pretrained(self.checkpoint, dtype=dtype, device=device)
        from cosmos3_fast.vae import synthetic

        config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, SYNTHETIC_SEED)
        tensors = synthetic.synthetic_state_dict(config, SYNTHETIC_SEED)
        return kind.from_state_dict(tensors, config, dtype, device)

    def decoder(self, dtype: torch.dtype, device: torch.device) -> Any:
        from cosmos3_fast.vae import FrameDecoder

        if self.checkpoint is not None:
            return FrameDecoder.from_pretrained(self.checkpoint, dtype=dtype, device=device)
        from cosmos3_fast.vae import synthetic

        config = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, SYNTHETIC_SEED)
        tensors = synthetic.synthetic_decoder_state_dict(config, SYNTHETIC_SEED)
        return FrameDecoder.from_state_dict(tensors, config, dtype, device)

    def vae(self, dtype: torch.dtype, device: torch.device, decodes: bool = False) -> Any:
        """diffusers' VAE; random weights have a small decoder unless it is to decode."""
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise UserError(
                f"the VAE itself needs diffusers, which cannot be imported ({error}): "
                "pip install 'cosmos3-fast[diffusers]'"
            ) from error
        if self.checkpoint is not None:
            if Path(self.checkpoint).is_file():
                raise UserError(
                    f"--vae {self.checkpoint!r} is one file, and the VAE itself is read from a "
                    "folder as diffusers writes it: use --mode fast"
                )
            bare = (Path(self.checkpoint) / "config.json").is_file()
            vae = AutoencoderKLWan.from_pretrained(
                self.checkpoint, subfolder=None if bare else "vae", torch_dtype=dtype
            )
        else:
            from cosmos3_fast.vae import synthetic

            vae = synthetic.synthetic_vae(
                synthetic.COSMOS3_VAE_CONFIG,
                SYNTHETIC_SEED,
                decoder_base_dim=None if decodes else 16,
            )
        # diffusers' own `to` warns of modules to keep in float32, of which this VAE has none.
        return torch.nn.Module.to(vae, device, dtype).eval()
