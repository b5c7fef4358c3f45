"""Memory of first encodes and decodes, and whether a bulk run grows with its pictures.

What is measured has a process of its own: `python -m benchmarks.suites.memory WHAT ...` prints
JSON, in MiB. Of a network, what the process holds beyond its imports with the weights loaded
(`resident`), and at its peak during the first call (`peak`, which includes the weights,
activations, workspaces and what is prepared from the weights at first use). The VAE is measured
without the part that is not called, in its favor. Of a bulk run, the peak of the process in which
the encoder runs.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.cases import DTYPES, TINY_DIM, seeded_clip, sides, vae_config
from benchmarks.harness import ROOT, Call, Figures, Suite, say
from benchmarks.suites.bulk import NEEDED
from cosmos3_fast.bulk import encode
from cosmos3_fast.frames import latent_frames
from cosmos3_fast.vae import ClipDecoder, FrameDecoder, FrameEncoder, synthetic


def status_mib(field: str) -> float:
    """A field of this process's status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def of_first_call(load: Callable[[], Call]) -> dict[str, float]:
    """`resident` after `load()`, and the `peak` of the call that it returns, beyond what was."""
    before = status_mib("VmRSS")
    call = load()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = status_mib("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    call()
    return {"resident": resident, "peak": status_mib("VmHWM") - before}


@torch.inference_mode()
def measure_network(
    what: str, which: str, dtype: str, size: str, frames: str, dim: str
) -> dict[str, float]:
    """`what` is "encode" (of one frame) or "decode" (of `frames`), `which` "vae" or "ours"."""
    base_dim = int(dim) if dim else None
    config = synthetic.synthetic_config(vae_config(base_dim), 0)
    encodes = what == "encode"
    given = torch.rand(1, 3, 1, *sides(size)) * 2 - 1
    if not encodes:
        latents = latent_frames(int(frames))
        given = seeded_clip(config["z_dim"], latents, size, config["scale_factor_spatial"])
    given = given.to(DTYPES[dtype])

    def load_vae() -> Call:
        vae = synthetic.synthetic_vae(config, 0, decoder_base_dim=16 if encodes else None)
        vae = torch.nn.Module.to(vae, DTYPES[dtype])
        if encodes:
            del vae.decoder
            return lambda: vae.encode(given)
        del vae.encoder
        return lambda: vae.decode(given)

    def load_ours() -> Call:
        if encodes:
            state = synthetic.synthetic_state_dict(config, 0)
            encoder = FrameEncoder.from_state_dict(state, config, DTYPES[dtype])
            return lambda: encoder(given)
        state = synthetic.synthetic_decoder_state_dict(config, 0)
        network = FrameDecoder if given.shape[2] == 1 else ClipDecoder
        decoder = network.from_state_dict(state, config, DTYPES[dtype])
        return lambda: decoder.decode_unnormalized(given)

    if which == "ours":
        return of_first_call(load_ours)
    import diffusers  # noqa: F401 - its import is not the call's memory

    return of_first_call(load_vae)


def measure_bulk(count: str) -> dict[str, float]:
    """Many small pictures through a tiny VAE."""
    torch.set_num_threads(1)
    config = synthetic.synthetic_config(vae_config(TINY_DIM), 0)
    tensors = synthetic.synthetic_state_dict(config, 0)
    encoder = FrameEncoder.from_state_dict(tensors, config, torch.float32)
    with tempfile.TemporaryDirectory() as name:
        write_pictures(Path(name) / "in.tar", int(count))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making them
        summary = encode(f"{name}/in.tar", f"{name}/out", vae=encoder, size=(32, 48))
        return {"samples": summary.total, "peak": status_mib("VmHWM")}


def write_pictures(path: Path, count: int) -> None:
    """A tar of seeded PNG pictures."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            buffer = io.BytesIO()
            values = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(values).save(buffer, "PNG")
            info = tarfile.TarInfo(f"{i:06}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)


def in_new_process(*arguments: str) -> Any:
    say(f"memory {' '.join(arguments)} ...")
    command = [sys.executable, "-m", "benchmarks.suites.memory", *arguments]
    return json.loads(subprocess.check_output(command, cwd=ROOT, text=True))


def networks(
    what: str,
    size: str,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    base_dim: int | None = None,
    frames: int = 1,
) -> Figures:
    """Both sides in each dtype; of an encoder also the bytes of its parameters in bfloat16."""
    figures: Figures = {"size": size, "frames": frames}
    if what == "encode":
        config = synthetic.synthetic_config(vae_config(base_dim))
        state = synthetic.synthetic_state_dict(config)
        folded = FrameEncoder.from_state_dict(state, config, torch.bfloat16)
        figures["bfloat16_parameters_bytes"] = sum(p.nbytes for p in folded.parameters())
    for dtype in dtypes:
        rest = dtype, size, str(frames), str(base_dim or "")
        both = {which: in_new_process(what, which, *rest) for which in ("vae", "ours")}
        figures[dtype] = {**both, "peak_ratio": both["ours"]["peak"] / both["vae"]["peak"]}
    return figures


def bulk(few: int, many: int) -> Figures:
    """Both counts, and the ratio of their peaks."""
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        return {"skipped": f"{', '.join(missing)} not installed"}
    counts = {"few": few, "many": many}
    figures = {name: in_new_process("bulk", str(count)) for name, count in counts.items()}
    return {**figures, "ratio": figures["many"]["peak"] / figures["few"]["peak"]}


ENCODER = Suite(
    networks,
    {
        "tiny": {"what": "encode", "size": "32x48", "base_dim": TINY_DIM},
        "short": {"what": "encode", "size": "480x832"},
        "full": {"what": "encode", "size": "480x832"},
    },
)
DECODER = Suite(
    networks,
    {
        "tiny": {
            **{"what": "decode", "size": "32x48", "dtypes": ("float32",)},
            "base_dim": TINY_DIM,
        },
        "short": {"what": "decode", "size": "256x448", "dtypes": ("float32",)},
        "full": {"what": "decode", "size": "256x448"},
    },
)
CLIP = Suite(
    networks,
    {
        "tiny": {
            **{"what": "decode", "size": "32x48", "dtypes": ("float32",)},
            **{"base_dim": TINY_DIM, "frames": 9},
        },
        "short": {"what": "decode", "size": "128x224", "dtypes": ("float32",), "frames": 5},
        "full": {"what": "decode", "size": "256x448", "dtypes": ("float32",), "frames": 17},
    },
)
BULK = Suite(
    bulk,
    {
        "tiny": {"few": 20, "many": 60},
        "short": {"few": 1000, "many": 3000},
        "full": {"few": 2000, "many": 10000},
    },
)

if __name__ == "__main__":
    subject, *options = sys.argv[1:]
    made = measure_bulk(*options) if subject == "bulk" else measure_network(subject, *options)
    print(json.dumps(made))
